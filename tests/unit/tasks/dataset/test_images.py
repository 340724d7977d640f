"""Image cells of every form, and what is wrong with the others."""

from __future__ import annotations

import base64
import io
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from support import video_files
from support.row_files import png
from vlmrl.tasks.dataset import fetch
from vlmrl.tasks.dataset.columns import Unusable
from vlmrl.tasks.dataset.fetch import fetched
from vlmrl.tasks.dataset.files import Place
from vlmrl.tasks.dataset.images import ImageReader
from vlmrl.tasks.dataset.videos import VideoReader, cells_of

BASE64 = base64.b64encode(png(50)).decode()


def encoded(kind: str) -> bytes:
    data = io.BytesIO()
    PILImage.new("RGB", (8, 8), (50, 50, 50)).save(data, kind)
    return data.getvalue()


def shades(
    cell: Any, folder: Path, image_root: Path | None = None, *, fetch: bool = False, hub: Path | None = None
) -> list[int]:
    place = Place(str(folder), None if hub is None else str(hub))
    return [int(pixels[0, 0, 0]) for pixels in ImageReader(image_root, fetch).pixels(cell, place)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "img").mkdir()
    (tmp_path / "img/a.png").write_bytes(png(50))
    (tmp_path / "img/b b.png").write_bytes(png(60))
    return tmp_path


@pytest.mark.parametrize(
    ("cell", "wanted"),
    [
        (None, []),
        ("", []),
        ([], []),
        (png(50), [50]),
        (bytearray(png(50)), [50]),
        ({"bytes": png(50), "path": None}, [50]),
        ({"bytes": png(50), "path": "not/there.png"}, [50]),
        ({"bytes": None, "path": "img/a.png"}, [50]),
        ({"bytes": None, "path": None}, []),
        ({"url": f"data:image/png;base64,{BASE64}"}, [50]),
        ({"image_url": {"url": f"data:image/png;base64,{BASE64}"}}, [50]),
        ({"image": "img/a.png"}, [50]),
        (PILImage.new("L", (3, 3), 50), [50]),
        (np.full((4, 4, 3), 50, np.uint8), [50]),
        ("img/a.png", [50]),
        ("./img/../img/a.png", [50]),
        (["img/a.png", "img/b b.png"], [50, 60]),
        (["img/a.png", None, ["img/b b.png", png(50)]], [50, 60, 50]),
        ('["img/a.png", "img/b b.png"]', [50, 60]),
        ("['img/a.png']", [50]),
        (BASE64, [50]),
        ("\n".join(BASE64[at : at + 76] for at in range(0, len(BASE64), 76)), [50]),
        (BASE64.rstrip("="), [50]),
        (base64.urlsafe_b64encode(encoded("JPEG")).decode(), [50]),
        *((base64.b64encode(encoded(kind)).decode(), [50]) for kind in ("GIF", "BMP", "TIFF", "WEBP", "JPEG")),
        (f"data:image/png;base64,{BASE64}", [50]),
        (f"DATA:image/png;charset=x;BASE64,{BASE64}", [50]),
    ],
)
def test_a_cell(cell: Any, wanted: list[int], folder: Path) -> None:
    found = shades(cell, folder)
    assert len(found) == len(wanted)
    assert np.allclose(found, wanted, atol=1), "JPEG and WebP are lossy"


def test_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shades(str(folder / "img/a.png"), Path("/nowhere")) == [50], "an absolute path"
    assert shades((folder / "img/a.png").as_uri(), Path("/nowhere")) == [50]
    assert shades((folder / "img/b b.png").as_uri(), Path("/nowhere")) == [60], "a space is %20 there"
    assert shades("a.png", Path("/nowhere"), image_root=folder / "img") == [50], "task.image_root"
    monkeypatch.setenv("HOME", str(folder))
    assert shades("~/img/a.png", Path("/nowhere")) == [50]


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (5, "an image is 5, a int: it must be a path, bytes, or a data URL"),
        (True, "an image is True"),
        ({"width": 5, "height": 6}, "an image is a struct of width, height, and none of them is known to hold it"),
        (
            "img/none.png",
            r"img/none\.png does not exist: set task\.image_root to the folder from which its path starts",
        ),
        ("img", "img: it is a folder|cannot be read: it is a folder"),
        ("a\0b.png", r"a\\x00b\.png' in .* does not exist|is no path that can be read"),
        ("x" * 5000, "is no path that can be read|does not exist"),
        (b"no image", "an encoded image of 8 bytes cannot be decoded"),
        (b"", "an encoded image of 0 bytes cannot be decoded"),
        (png(50)[:45], "cannot be decoded"),
        ("data:image/png;base64,!!!", "data URL whose base64 is damaged"),
        ("https://example.com/a.png", r"is a URL, and task\.fetch=false downloads nothing: set task\.fetch=true"),
        (np.zeros((4, 4), np.float32), r"must be uint8 \[H, W, 3\]"),
    ],
)
def test_what_is_no_image(cell: Any, said: str, folder: Path) -> None:
    with pytest.raises(Unusable, match=said) as found:
        shades(cell, folder)
    assert len(found.value.text) < 600


def test_data_of_a_hub_stay_in_their_folder(folder: Path) -> None:
    (folder / "data").mkdir()
    assert shades("../img/a.png", folder / "data") == [50], "local data may"
    for path in ("../img/a.png", str(folder / "img/a.png"), "x/../../img/a.png"):
        with pytest.raises(Unusable, match="lies outside of"):
            shades(path, folder / "data", hub=folder / "data")
        with pytest.raises(Unusable, match=r"lies outside of|does not exist"):
            shades(path.replace("a.png", "b.png"), folder / "data", hub=folder / "data")
    assert shades("img/a.png", folder, hub=folder) == [50]
    assert shades("img/a.png", folder / "data", hub=folder) == [50], "below the folder of the data set"
    assert shades("a.png", folder / "data", folder / "img", hub=folder / "data") == [50], "task.image_root"
    with pytest.raises(Unusable, match="lies outside of"):
        shades("../img/a.png", folder / "data", folder / "data", hub=folder)


def test_a_link_out_of_the_folder_of_a_hub(folder: Path) -> None:
    """A hub's cache is made of links, so the text of the path counts and not where it leads."""
    (folder / "data").mkdir()
    (folder / "data/a.png").symlink_to("../img/a.png")
    assert shades("a.png", folder / "data", hub=folder / "data") == [50]


# ── downloads ───────────────────────────────────────────────────────────────────────────────────────────────


class Site:
    """A web server on this machine. `pages`: path → status, headers, body."""

    def __init__(self) -> None:
        self.pages: dict[str, tuple[int, dict[str, str], bytes | Callable[[Any], None]]] = {}
        self.asked: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(self.path)
                status, headers, body = site.pages.get(self.path, (404, {}, b""))
                self.send_response(status)
                for name, text in headers.items():
                    self.send_header(name, text)
                self.end_headers()
                if isinstance(body, bytes):
                    self.wfile.write(body)
                else:
                    body(self.wfile)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("VLMRL_CACHE", str(tmp_path / "cache"))
    made = Site()
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def test_an_image_is_downloaded_once(site: Site, tmp_path: Path) -> None:
    site.pages["/a.png"] = (200, {}, png(50))
    for _ in range(2):
        assert shades(f"{site.url}/a.png", tmp_path, fetch=True) == [50]
        assert shades({"url": f"{site.url}/a.png"}, tmp_path, fetch=True) == [50]
    assert site.asked == ["/a.png"]
    (kept,) = (tmp_path / "cache/images").iterdir()
    assert kept.read_bytes() == png(50), "and no half-written file beside it"


def test_videos_and_their_frames_are_downloaded_once(site: Site, tmp_path: Path) -> None:
    data = video_files.encoded(video_files.moving(3), rate=4)
    site.pages |= {"/a.mkv": (200, {}, data), "/1.png": (200, {}, png(50)), "/2.png": (200, {}, png(60))}
    place, reader = Place(str(tmp_path)), VideoReader(None, fetch=True)
    for _ in range(2):
        (file,) = cells_of(f"{site.url}/a.mkv")
        assert reader.load(file, place).part.source == data
        (frames,) = cells_of([f"{site.url}/1.png?size=8", f"{site.url}/2.png"])
        site.pages["/1.png?size=8"] = site.pages["/1.png"]
        assert [int(frame[0, 0, 0]) for frame in reader.load(frames, place).part.source] == [50, 60]
    assert site.asked == ["/a.mkv", "/1.png?size=8", "/2.png"]
    site.pages["/b.mkv"] = (404, {}, b"")
    with pytest.raises(Unusable, match=r"the video '.*b.mkv' cannot be downloaded: HTTP status 404"):
        reader.load(next(cells_of(f"{site.url}/b.mkv")), place)


def test_redirects(site: Site, tmp_path: Path) -> None:
    site.pages["/a"] = (302, {"location": "/b"}, b"")
    site.pages["/b"] = (301, {"location": f"{site.url}/c.png"}, b"")
    site.pages["/c.png"] = (200, {}, png(50))
    assert shades(f"{site.url}/a", tmp_path, fetch=True) == [50]
    site.pages["/round"] = (302, {"location": "/round"}, b"")
    with pytest.raises(Unusable, match="more than 5 redirects"):
        fetched(f"{site.url}/round", allow_private=True)
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/a", "gopher://127.0.0.1/"):
        site.pages["/out"] = (302, {"location": target}, b"")
        with pytest.raises(Unusable, match=r"which is no http\(s\) URL"):
            fetched(f"{site.url}/out", allow_private=True)


def test_what_cannot_be_downloaded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unusable, match="HTTP status 404"):
        fetched(f"{site.url}/none.png", allow_private=True)
    with pytest.raises(Unusable, match=r"cannot be downloaded \(ConnectError"):
        fetched("http://127.0.0.1:9/a.png", allow_private=True)
    monkeypatch.setattr(fetch, "MAX_BYTES", 1 << 20)
    site.pages["/large"] = (200, {}, b"x" * ((1 << 20) + 1))
    with pytest.raises(Unusable, match="more than 1 MiB"):
        fetched(f"{site.url}/large", allow_private=True)


def test_a_server_that_drips(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.0)
    site.pages["/slow"] = (200, {}, png(50))
    with pytest.raises(Unusable, match="was not downloaded within 0 seconds"):
        fetched(f"{site.url}/slow", allow_private=True)


def test_remote_data_may_not_call_this_network(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.pages["/a.png"] = (200, {}, png(50))
    with pytest.raises(Unusable, match="an address of this machine or its network"):
        fetched(f"{site.url}/a.png", allow_private=False)
    assert site.asked == [], "it was not asked"


def test_no_way_back_from_the_public_net(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address counts as public here; it redirects to this machine, which local data might call directly."""
    site.pages["/a.png"] = (302, {"location": f"{site.url}/secret"}, b"")
    site.pages["/secret"] = (200, {}, png(50))
    real = socket.getaddrinfo
    answers = iter([[(2, 1, 6, "", ("93.184.216.34", 80))]])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: next(answers, None) or real(*a, **k))
    with pytest.raises(Unusable, match="an address of this machine or its network"):
        fetched(f"{site.url}/a.png", allow_private=True)
    assert "/secret" not in site.asked
