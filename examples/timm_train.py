"""timm's own ``train.py`` with three added lines: prints them, and runs the script with them.

    git clone https://github.com/huggingface/pytorch-image-models
    python examples/timm_train.py pytorch-image-models/train.py 'lora, rank=8' --data-dir DIR --model … --pretrained …

The first argument is the script, the second the method with its options, and all others are the script's own. The file of
the best epoch's adapter is ``adapter.safetensors`` beside the script's checkpoints. With ``--model-ema`` the script judges
the average, whose handle is ``vpeft.get_handle(averaged model)``: save that one then, by hand.
"""

import ast
import sys
from pathlib import Path


def three_lines(method: str) -> tuple[str, str, str]:
    """The import, the line after ``model = create_model(…)``, and the one after ``saver.save_checkpoint(…)``."""
    name, _, options = method.partition(",")
    return (
        "import vpeft",
        f'peft = vpeft.attach(model, "{name.strip()}"{f", {options.strip()}" if options.strip() else ""})',
        'epoch == best_epoch and peft.save(os.path.join(output_dir, "adapter.safetensors"))',
    )


def added(source: str, method: str) -> tuple[str, list[tuple[int, str]]]:
    """A train script's text with the lines in it, and each line with its number there.

    Raises:
        SystemExit: the script has no ``model = create_model(…)`` or no ``save_checkpoint(…)``, or several.
    """
    tree = ast.parse(source)
    model = [n for n in ast.walk(tree) if isinstance(n, ast.Assign) and _calls(n, "create_model") and _name(n) == "model"]
    saving = [n for n in ast.walk(tree) if isinstance(n, ast.Assign | ast.Expr) and _calls(n, "save_checkpoint")]
    if len(model) != 1 or len(saving) != 1:
        raise SystemExit("expected one `model = create_model(…)` and one `saver.save_checkpoint(…)` in the script")
    first = next(n for n in tree.body if isinstance(n, ast.Import))  # after a docstring and `from __future__`
    places = [(n.end_lineno, n.col_offset) for n in (first, model[0], saving[0])]
    lines, numbered = source.splitlines(), []
    for more, ((after, indent), text) in enumerate(zip(places, three_lines(method), strict=True)):
        lines.insert(after + more, " " * indent + text)
        numbered.append((after + more + 1, text))
    return "\n".join(lines) + "\n", numbered


def _calls(node: ast.Assign | ast.Expr, name: str) -> bool:
    called = node.value.func if isinstance(node.value, ast.Call) else None
    return name in (getattr(called, "id", None), getattr(called, "attr", None))


def _name(node: ast.Assign) -> str | None:
    return getattr(node.targets[0], "id", None)


def main(script: str, method: str, arguments: list[str]) -> None:
    if "--model-ema" in arguments:
        raise SystemExit("--model-ema: the script judges the average, and the third line saves the model; see --help")
    text, numbered = added(Path(script).read_text(), method)
    for number, line in numbered:
        print(f"{script}:{number}: {line}", file=sys.stderr)
    sys.argv = [script, *arguments]
    exec(compile(text, script, "exec"), {"__name__": "__main__", "__file__": script})


if __name__ == "__main__":
    if len(sys.argv) < 3 or "--help" in sys.argv[1:3]:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
