"""`verify` names the images that have changed or cannot be decoded."""

from data_pipeline.verify_images import verify
from tests.pictures import index_of


def test_verify_names_what_changed_and_deep_decodes_every_image(folder):
    index = index_of(folder)
    assert verify(index, progress=False) == verify(index, deep=True, progress=False) == []
    data = bytearray((folder / "a/01.jpg").read_bytes())
    scan = data.index(b"\xff\xc4")  # a Huffman table: the header walk steps over it
    data[scan + 5 : scan + 21] = b"\xff" * 16
    (folder / "a/01.jpg").write_bytes(data)
    (folder / "b/02.jpg").write_bytes((folder / "b/02.jpg").read_bytes()[:-100])
    (folder / "c/00.jpg").unlink()
    assert [name for name, _ in verify(index, progress=False)] == ["b/02.jpg", "c/00.jpg"]
    found = dict(verify(index, deep=True, progress=False))
    assert list(found) == ["a/01.jpg", "b/02.jpg", "c/00.jpg"]
    assert "cannot be decoded" in found["a/01.jpg"]
