"""Build a plain-text corpus from documentation that Debian packages ship; split by document into train/valid/test.

    apt-get install linux-doc-6.1 python3.11-doc perl-doc
    python make_corpus.py corpus/          # about 46 MB train, 0.7 MB valid, 1.1 MB test

Documents are assigned by the md5 of their path: 2 % test, 2 % valid, the rest train.
"""

import gzip
import hashlib
import re
import sys
from pathlib import Path

EOT = "\n<|endoftext|>\n"


def documents():
    for path in sorted(Path("/usr/share/doc/python3.11/html/_sources").rglob("*.txt")):
        yield path, path.read_text(errors="ignore")
    for path in sorted(Path("/usr/share/perl").rglob("*.pod")):
        yield path, path.read_text(errors="ignore")
    for path in sorted(Path("/usr/share/doc/linux-doc-6.1/Documentation").rglob("*")):
        if not path.is_file() or path.is_symlink() or "translations" in path.parts:
            continue
        name = path.name.removesuffix(".gz")
        if name.endswith((".rst", ".txt")) or "." not in name:
            opener = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rt", errors="ignore") as file:
                yield path, file.read()


def split_of(path: Path) -> str:
    bucket = int(hashlib.md5(str(path).encode()).hexdigest(), 16) % 100
    return "test" if bucket < 2 else "valid" if bucket < 4 else "train"


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    files = {split: (out / f"{split}.txt").open("w") for split in ("train", "valid", "test")}
    for path, text in documents():
        if len(text) < 500 or sum(c.isascii() for c in text) / len(text) < 0.97:
            continue
        tidy = re.sub(r"\n{3,}", "\n\n", text.replace("\t", "    "))
        files[split_of(path)].write("".join(c for c in tidy if c.isascii()) + EOT)
    for split, file in files.items():
        print(split, file.tell())
        file.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
