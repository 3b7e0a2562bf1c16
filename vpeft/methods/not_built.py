"""Published methods that are not here, and why: nothing is dropped in silence."""

NOT_BUILT = {
    "LION (Implicit Vision Prompt Tuning, AAAI 2024)": "not specified: no official code could be read, and the paper's text "
    "leaves the implicit layers' solver and widths open",
    "E3VA (Parameter-efficient is not sufficient, AAAI 2024, arXiv 2306.09729)": "not specified: no official code could be "
    "read; `ladder_adapter` is an extension of ours in its spirit, and not it",
    "EFFT (Effective Factor Tuning, arXiv 2311.06749)": "specified and not built yet: the released `methods/Set_EFFT.py` "
    "can be read (its runner imports a module that is not there). One pair of factors U, V for all blocks and a small core "
    "for each kind of matrix, the same in every block; `fact_tk`, which mixes its core anew for each matrix of each block, "
    "is the nearest that is here",
    "QLoRA (NeurIPS 2023, arXiv 2305.14314)": "LoRA over 4-bit weights: a quantised backbone is no longer timm's model",
    "SAM-LST, SAM-Adapter, Conv-LoRA": "made for Segment Anything's decoder and prompts, which timm does not have",
    "ViT-Adapter (ICLR 2023, arXiv 2205.08534)": "trains the whole backbone and needs a compiled deformable "
    "attention; it is no parameter-efficient method",
}
