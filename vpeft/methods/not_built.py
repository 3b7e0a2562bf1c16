"""Published methods that are not here, and why: nothing is dropped in silence."""

NOT_BUILT = {
    "LION (Implicit Vision Prompt Tuning, AAAI 2024)": "not specified: no official code could be read, and the paper's text "
    "leaves the implicit layers' solver and widths open",
    "E3VA (Parameter-efficient is not sufficient, AAAI 2024, arXiv 2306.09729)": "not specified: no official code could be "
    "read; `ladder_adapter` is an extension of ours in its spirit, and not it",
    "EFFT (tensor decomposition of ViT weights)": "not specified: no formula and no official code could be read; "
    "`mpo` is the matrix-product form that is",
    "QLoRA (NeurIPS 2023, arXiv 2305.14314)": "LoRA over 4-bit weights: a quantised backbone is no longer timm's model",
    "SAM-LST, SAM-Adapter, Conv-LoRA": "made for Segment Anything's decoder and prompts, which timm does not have",
    "ViT-Adapter (ICLR 2023, arXiv 2205.08534)": "trains the whole backbone and needs a compiled deformable "
    "attention; it is no parameter-efficient method",
}
