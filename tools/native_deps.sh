#!/bin/sh
# Fetches what the C++ runtime's tests compile and cross-compile against, without installing it:
#
#   tools/native_deps.sh DEST
#
#   DEST/include       ONNX Runtime's C headers, of Debian's libonnxruntime-dev (trixie)
#   DEST/lib-aarch64   libonnxruntime.so of the wheel for 64-bit Arm Linux
#
# Needs apt-get, dpkg-deb and pip; works without root. The tests look in build/native of the
# repository and in $EDGEQDM_NATIVE_DEPS. PYTHON names the interpreter, default python3; ONNXRUNTIME
# what pip is asked for, default the version in constraints.txt.
set -eu

[ $# -eq 1 ] || { echo "usage: $0 DEST" >&2; exit 2; }
mkdir -p "$1"
dest=$(cd "$1" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
here=$(cd "$(dirname "$0")" && pwd)
pinned=$(sed -n 's/^onnxruntime==/onnxruntime==/p' "$here/../constraints.txt")
# The first of the system's own sources; another release of Debian is on the same mirror.
mirror=$(apt-get indextargets --format '$(ORIGIN) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
    sed -n 's/^Debian main //p' | head -n 1)
[ -n "$mirror" ] || { echo "$0: no Debian source in /etc/apt, run apt-get update first" >&2; exit 4; }

# Lists and cache of their own: those of the system stay as they are.
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/etc" "$work/deb"
keys=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keys] $mirror trixie main" > "$work/etc/sources.list"
apt() {
    apt-get -qq -o Dir::Etc::sourcelist="$work/etc/sources.list" -o Dir::Etc::sourceparts=- \
        -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" \
        -o APT::Sandbox::User="" "$@"
}
apt update
(cd "$work/deb" && apt download libonnxruntime-dev)
dpkg-deb -x "$work"/deb/libonnxruntime-dev_*.deb "$work/dev"
rm -rf "$dest/include"
cp -R "$work/dev/usr/include/onnxruntime" "$dest/include"

"$python" -m pip download -q --no-deps --only-binary=:all: \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --dest "$work/wheel" "${ONNXRUNTIME:-$pinned}"
rm -rf "$dest/lib-aarch64"
mkdir -p "$dest/lib-aarch64"
"$python" - "$work"/wheel/onnxruntime-*.whl "$dest/lib-aarch64" <<'END'
import pathlib, sys, zipfile

wheel, out = sys.argv[1], pathlib.Path(sys.argv[2])
with zipfile.ZipFile(wheel) as archive:
    (name,) = [n for n in archive.namelist() if "/capi/libonnxruntime.so." in n]
    (out / "libonnxruntime.so").write_bytes(archive.read(name))
(out / "libonnxruntime.so.1").symlink_to("libonnxruntime.so")
END
echo "$dest"
