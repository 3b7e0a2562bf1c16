#!/usr/bin/env bash
# Builds the source distribution and from it the wheel, installs the wheel in a fresh environment and uses it from elsewhere.
#
#   tools/smoke_wheel.sh [lowest|newest] [FOLDER]
#
# lowest takes every dependency at the lower bound that setup.cfg states, newest at the newest release. FOLDER keeps the
# environment (several GB) for another time; by default all is in a temporary folder, and gone afterwards.
set -euo pipefail
which=${1:-newest}
[[ $which == lowest || $which == newest ]] || { echo "usage: tools/smoke_wheel.sh [lowest|newest] [FOLDER]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
unset PYTHONPATH  # the wheel is meant, not a checkout
if [[ $# -gt 1 ]]; then mkdir -p "$2" && work=$(cd "$2" && pwd); else work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT; fi

python3 -m venv "$work/build" && "$work/build/bin/python" -m pip install --quiet build
rm -rf "$work/dist" && "$work/build/bin/python" -m build --outdir "$work/dist" "$root" >"$work/build.log" || { tail "$work/build.log"; exit 1; }
wheel=$(echo "$work"/dist/*.whl)

python3 - "$root/setup.cfg" "$which" >"$work/constraints.txt" <<'EOF'
import configparser, sys
config = configparser.ConfigParser()
config.read(sys.argv[1])
for line in config["options"]["install_requires"].split():
    if sys.argv[2] == "lowest" and ">=" in line:
        print(line.replace(">=", "=="))
EOF
env="$work/$which" python="$work/$which/bin/python"
[[ -x $python ]] || python3 -m venv "$env"
"$python" -m pip install --quiet --upgrade --upgrade-strategy eager --constraint "$work/constraints.txt" "$wheel"
"$python" -m pip install --quiet --force-reinstall --no-deps "$wheel"  # also where the version was there already

rm -rf "$work/elsewhere" && mkdir "$work/elsewhere" && cd "$work/elsewhere"
"$python" -u - <<'EOF'
import sys, timm, torch
import vpeft

assert "elsewhere" not in vpeft.__file__ and "site-packages" in vpeft.__file__, vpeft.__file__
print(f"vpeft {vpeft.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}, timm {timm.__version__}")
x, labels = torch.randn(8, 3, 28, 28), torch.arange(8) % 2  # or one clip of eight frames
done = []
for name in ("vit_micro_patch4_28.vpeft_fashion", "swin_micro_patch2_window7_28.vpeft_fashion"):
    for method in vpeft.list_methods() if name.startswith("vit") else ("lora", "adaptformer", "vpt_deep"):
        model, fresh = (timm.create_model(name, pretrained=True).eval() for _ in range(2))
        try:
            handle = vpeft.attach(model, method)
        except vpeft.VpeftError as error:  # a method that cannot act on a Swin, or that needs to be told more
            print(f"  {method} on {name}: {error}"[:150])
            continue
        if handle.method.needs_calibration:
            handle.calibrate([(x, labels)], progress=False)
        with torch.no_grad():
            for p in handle.parameters():
                p.add_(0.01 * torch.randn_like(p))
            vpeft.load(fresh, handle.save("adapter.safetensors"))
            assert torch.equal(model.eval()(x), fresh.eval()(x)), method
        done.append(method)
assert len(done) > 50, done
print(f"{len(done)} pairs of method and backbone attached, saved and loaded")
EOF
vpeft() { "$env/bin/vpeft" "$@"; }
vpeft --version
vpeft configs list | wc -l
vpeft configs copy digits/adaptformer
vpeft train --cfg digits/adaptformer train.epochs=1 schedule.warmup_epochs=0 output=by_name
vpeft train --cfg configs/digits/adaptformer.yaml train.epochs=1 schedule.warmup_epochs=0 output=copied
vpeft test --cfg digits/adaptformer --ckpt copied/digits/adaptformer/best.safetensors
# What later versions bring along.
if [[ $(vpeft --help) == *" zoo "* ]]; then vpeft zoo list; fi
echo "$which: works"
