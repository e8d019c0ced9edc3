"""Downloads from a server on loopback: good files, refused files, and the cache."""

import hashlib
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pooch.core
import pytest
from loopback import Answer, serve

from tensormask.checkpoint.downloads import cache_folder, cache_path, download
from tensormask.utils.errors import UserError

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()
GOOD = Answer(CONTENT)
BUSY = Answer(b"busy", status=503)
TRUNCATED = Answer(CONTENT[:5000], headers=(("Content-Length", str(len(CONTENT))),))


@pytest.fixture
def server():
    with serve() as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The seconds of waiting between attempts, instead of waiting."""
    waited = []
    monkeypatch.setattr(pooch.core, "time", SimpleNamespace(sleep=waited.append))
    return waited


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


@pytest.mark.parametrize("sha256", [None, SHA256, SHA256[:8]])
def test_a_good_file_is_cached_and_used_without_a_server(cache, sha256, caplog):
    with serve() as server, caplog.at_level(logging.INFO):
        url = server.add("/models/a.pkl", GOOD)
        path = download(url, sha256)
    assert path.read_bytes() == CONTENT
    assert path.name == "a.pkl"
    assert files_in(cache) == [path]
    assert path.stat().st_mode & 0o777 == 0o644
    assert f"downloaded {url} (0.0 MB, SHA-256 {SHA256})" in caplog.text
    assert download(url, sha256) == path  # the server is gone
    assert server.requests == ["/models/a.pkl"]


@pytest.mark.parametrize(
    "answer, reason",
    [
        (TRUNCATED, "IncompleteRead"),
        (BUSY, "503"),
        (Answer(b"", status=429), "429"),
        (Answer(b"5\r\nabc", headers=(("Transfer-Encoding", "chunked"),)), "Connection broken"),
        (Answer(b"no gzip", headers=(("Content-Encoding", "gzip"),)), "gzip"),
        (Answer(CONTENT, headers=(("Content-Length", "12, 13"),)), "unmatching"),
    ],
)
def test_transient_errors_are_retried(server, cache, pauses, answer, reason):
    url = server.add("/a.pkl", answer)
    with pytest.raises(OSError, match=reason) as error:
        download(url)
    assert url in str(error.value)
    assert "by hand" in str(error.value)
    assert len(server.requests) == 3
    assert pauses == [1, 2]
    assert files_in(cache) == []
    server.add("/a.pkl", answer, answer, GOOD)
    assert download(url).read_bytes() == CONTENT
    assert len(server.requests) == 6


@pytest.mark.parametrize("sha256", ["0" * 64, "0" * 8])
def test_a_file_with_another_hash_is_refused(server, cache, sha256):
    url = server.add("/a.pkl", GOOD)
    with pytest.raises(OSError) as error:
        download(url, sha256)
    assert SHA256 in str(error.value)
    assert sha256 in str(error.value)
    assert files_in(cache) == []
    assert len(server.requests) == 1
    assert download(url, SHA256).read_bytes() == CONTENT


def test_a_cached_file_that_was_damaged_is_downloaded_again(server, caplog):
    url = server.add("/a.pkl", GOOD)
    path = download(url)
    path.write_bytes(b"other")
    assert download(url).read_bytes() == b"other"  # its hash is unknown
    assert download(url, SHA256).read_bytes() == CONTENT
    assert f"{path} is damaged" in caplog.text


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_permanent_answer_is_an_error_at_once(server, cache, pauses, status):
    url = server.add("/a.pkl", Answer(b"page", status=status))
    with pytest.raises(OSError, match=f"{status} Client Error") as error:
        download(url)
    assert type(error.value) is OSError
    assert len(server.requests) == 1
    assert pauses == []
    assert files_in(cache) == []


@pytest.mark.parametrize("status", [200, 204, 302])
def test_an_empty_file_is_refused(server, cache, status):
    with pytest.raises(OSError, match="sent an empty file"):
        download(server.add("/a.pkl", Answer(status=status)))
    assert files_in(cache) == []


def test_no_server(cache):
    with serve() as server:
        url = server.add("/a.pkl", GOOD)
    with pytest.raises(OSError, match=r"Connection refused") as error:
        download(url)
    assert "Max retries" not in str(error.value)
    assert files_in(cache) == []


def test_redirects_are_followed_to_the_network_only(server, tmp_path):
    (tmp_path / "secret").write_bytes(b"local")
    new = server.add("/new/b.pkl", GOOD)
    url = server.add("/a.pkl", Answer(status=302, headers=(("Location", new),)))
    assert download(url) == cache_path(url)
    assert cache_path(url).read_bytes() == CONTENT
    local = (tmp_path / "secret").as_uri()
    loop = server.add("/loop.pkl", GOOD)
    for location in (local, loop, "http://[::1/a.pkl"):
        server.add("/loop.pkl", Answer(status=302, headers=(("Location", location),)))
        with pytest.raises(OSError, match=r"connection adapters|redirects|IPv6"):
            download(loop)


def test_a_cache_that_cannot_be_written(server, cache):
    cache.write_text("a file")
    with pytest.raises(OSError, match="TENSORMASK_CACHE"):
        download(server.add("/a.pkl", GOOD))


def test_two_at_once(server, cache):
    """Nothing in memory is shared by downloads: threads show what two processes would."""
    both = threading.Barrier(2, timeout=60)
    url = server.add("/a.pkl", GOOD._replace(before=both.wait))
    with ThreadPoolExecutor(2) as executor:
        paths = list(executor.map(download, [url] * 2, [SHA256] * 2))
    assert paths == [cache_path(url)] * 2
    assert len(server.requests) == 2
    assert files_in(cache) == [cache_path(url)]
    assert cache_path(url).read_bytes() == CONTENT


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(server, monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    download(server.add("/a.pkl", GOOD))
    assert ("100%" in capsys.readouterr().err) is terminal


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TENSORMASK_CACHE", "~/there")
    assert cache_folder() == Path.home() / "there"
    monkeypatch.delenv("TENSORMASK_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "tensormask"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "tensormask"


def test_cache_path(cache):
    path = cache_path("https://example.com:8443/zoo/v1.0/model_final.pkl?download=1#top")
    assert path.name == "model_final.pkl"
    assert path.parent.name.rpartition("-")[0] == "example.com_zoo_v1.0"
    assert path.parent.parent == cache
    assert path == cache_path("https://example.com:8443/zoo/v1.0/model_final.pkl?download=1")


def test_no_two_urls_share_a_file():
    urls = [
        *("https://h/a/model.pkl", "http://h/a/model.pkl", "https://h:8443/a/model.pkl"),
        *("https://h/b/model.pkl", "https://h/A/model.pkl", "https://h/a_model.pkl", "https://h/a"),
        *("https://h/a/model.pkl?v=1", "https://h/a/model.pkl?v=2", "https://h/a/model.pkl/b.pkl"),
        *(f"https://h/{'a' * 5000}{end}.pkl" for end in "bc"),
    ]
    folders = {str(cache_path(url).parent).lower() for url in urls}
    assert len(folders) == len(urls)


@pytest.mark.parametrize(
    "path",
    [
        *("/../../../escaped.pkl", "/a/..%2f..%2f..%2fescaped.pkl", "/%2e%2e/%2e%2e/escaped.pkl"),
        *("/..%5c..%5cescaped.pkl", "/..\\..\\escaped.pkl", "/.../...escaped.pkl"),
        *("/a.pkl?../../../escaped.pkl", "//etc//escaped.pkl", "/a%00b.pkl", "/a/%2e%2e"),
        f"/{'long' * 2000}/{'name' * 500}.pkl",
    ],
)
def test_no_url_leads_out_of_the_cache(server, cache, tmp_path, path):
    server.otherwise = GOOD  # whatever the client makes of the dots
    written = download(f"http://127.0.0.1:{server.server_port}{path}")
    assert written.read_bytes() == CONTENT
    assert written.parent.parent == cache
    assert files_in(tmp_path) == [written]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "url",
    [
        *("https://", "https:///a.pkl", "https://host", "https://host/", "https://host/folder/"),
        *("https://host/..", "https://host/?file=a.pkl", "https://host:port/a.pkl"),
        *("https://host:99999/a.pkl", "https://[host/a.pkl", "https://host/\ud800.pkl"),
        *("a.pkl", ""),
    ],
)
def test_broken_urls_are_refused(url):
    with pytest.raises(ValueError, match="is not the URL of a file"):
        download(url)


def test_a_path_and_a_limit_of_the_size(server, cache, tmp_path):
    url, path = server.add("/a.png", GOOD), tmp_path / "image"
    with pytest.raises(UserError, match="is not the URL of a file"):
        download("http://", path=path)
    with pytest.raises(OSError, match=r"larger than 0\.01 MB"):
        download(url, path=path, max_bytes=10_000)
    assert files_in(tmp_path) == []
    assert len(server.requests) == 1  # not repeated
    assert download(url, path=path, max_bytes=len(CONTENT)) == path
    assert files_in(tmp_path) == [path]
    assert path.read_bytes() == CONTENT
