#!/bin/sh
# Fetches onnxruntime-web from npm into DEST, for tests and for pages that are served from here:
#   tools/web_deps.sh [DEST]        default build/web; the files are then in DEST/ort
set -eu
version=1.30.0
dest=${1:-build/web}
fetched=$(mktemp -d)
trap 'rm -rf "$fetched"' EXIT
npm pack --silent --pack-destination "$fetched" "onnxruntime-web@$version" >"$fetched/name"
tar -xzf "$fetched/$(cat "$fetched/name")" -C "$fetched"
mkdir -p "$dest/ort"
for name in ort.wasm.min.mjs ort-wasm-simd-threaded.mjs ort-wasm-simd-threaded.wasm; do
  cp "$fetched/package/dist/$name" "$dest/ort/"
done
echo "onnxruntime-web $version: $dest/ort"
