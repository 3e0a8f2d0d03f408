import errno
import gzip
import hashlib
import json
import multiprocessing
import os
import pickle
import shlex
import shutil
import signal
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from filelock import FileLock
from torch.utils.data import DataLoader

from titans_scale.data import ByteTokenizer, load_tokenizer, open_split, train_sentencepiece, write_shards
from titans_scale.data.reading.faults import LostError, ReadError, ReadPolicy
from titans_scale.data.reading.store import fetch_file

TEXT = "".join(chr(ord("a") + number % 26) for number in range(30_000))
"""With both its ends 30,002 tokens: four shards of 50 samples of 128 tokens, and one of 35."""
SAMPLES = [0, 60, 120, 199, 234, 61]
FILES = ["index.json", "000000.tar", "000001.tar", "000002.tar", "000003.tar", "000004.tar"]


class Server(ThreadingHTTPServer):
    """A folder over HTTP, with faults: for each file what is to happen to the requests for it, in turn; then all is well."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.requests = folder, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}/tokens"

    def asked_for(self, name):
        return [start for path, start in self.requests if path.endswith(name)]

    def handle_error(self, request, client_address):
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.removeprefix("/tokens/").partition("?")[0]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.server.requests.append((self.path, start))
        file, faults = self.server.folder / name, self.server.faults.get(name.rpartition("/")[2], [])
        fault = faults.pop(0) if faults and faults[0] != "always" else faults[1] if faults else None
        if isinstance(fault, int) or not file.is_file():
            self.send_error(fault or 404)
            return
        data = file.read_bytes()
        if fault == "flip":
            data = data[:700] + bytes([data[700] ^ 1]) + data[701:]
        if fault == "other":
            data += bytes(512)
        if fault == "whole":
            start = 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if fault == "silent":
            time.sleep(1.5)
        half = start + (len(data) - start) // 2
        self.wfile.write(data[start : half if fault == "cut" else None])
        self.close_connection = True

    def log_message(self, *arguments):
        """Not on the tests' output."""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    write_shards([TEXT], folder / "train", tokenizer=ByteTokenizer(), sequence_length=128, samples_per_shard=50)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    shutil.copytree(written / "train", tmp_path / "tokens" / "train")
    return tmp_path / "tokens"


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def policy(tmp_path):
    def make(**changes):
        return ReadPolicy(**{"retries": 3, "retry_seconds": 0.001, "timeout_seconds": 20, "cache_dir": str(tmp_path / "cache"), **changes})

    return make


def tokens(dataset, numbers=SAMPLES):
    rows = dataset.__getitems__(numbers)
    return rows.tokens.tolist(), rows.counts.tolist()


def cached(tmp_path, pattern="*.tar"):
    return sorted(file for file in (tmp_path / "cache").rglob(pattern))


def pipe_from(folder, before=""):
    return f"pipe:{before}cat {shlex.quote(str(folder))}/{{}}"


@pytest.mark.parametrize("kind", ["http", "pipe"])
def test_a_remote_split_gives_the_samples_of_the_local_one_and_fetches_each_shard_once(server, folder, policy, kind, tmp_path):
    local = open_split(folder, "train")
    count = f"echo {{}} >> {shlex.quote(str(tmp_path / 'log'))}; "
    path = server.url if kind == "http" else pipe_from(folder, count)
    for _ in range(2):
        remote = open_split(path, "train", policy=policy())
        assert tokens(remote) == tokens(local)
        assert remote.fingerprint == local.fingerprint
    asked = [name for name, _ in server.requests] if kind == "http" else (tmp_path / "log").read_text().split()
    wanted = {name: 2 if name == "index.json" else 1 for name in FILES}
    assert Counter(name.rpartition("/")[2] for name in asked) == wanted
    assert [file.read_bytes() for file in cached(tmp_path)] == [(folder / "train" / name).read_bytes() for name in FILES[1:]]


FAULTS = {
    "refused": ([500, 503, 429], [0, 0, 0, 0]),
    "cut": (["cut", "cut"], [0, 16, 24]),
    "cut, then whole": (["cut", "whole"], [0, 16]),
    "cut, then less than we have": (["cut", 416], [0, 16, 0]),
    "flipped bit": (["flip"], [0, 0]),
    "other size": (["other"], [0, 0]),
    "silent": (["silent"], [0, 0]),
}


@pytest.mark.parametrize(("faults", "starts"), FAULTS.values(), ids=FAULTS)
def test_what_fails_on_its_way_is_fetched_again_and_counted(server, folder, policy, faults, starts, tmp_path):
    server.faults["000001.tar"] = [*faults]
    dataset = open_split(server.url, "train", policy=policy(timeout_seconds=0.5))
    rows = dataset.__getitems__([10, 60])
    assert rows.tokens.tolist() == tokens(open_split(folder, "train"), [10, 60])[0]
    assert (rows.retries, rows.skipped) == (len(starts) - 1, 0)
    size = (folder / "train" / "000001.tar").stat().st_size
    assert server.asked_for("000001.tar") == [size * start // 32 for start in starts]
    assert cached(tmp_path)[1].read_bytes() == (folder / "train" / "000001.tar").read_bytes()
    assert cached(tmp_path, "*.unfinished") == []


@pytest.mark.parametrize(
    ("fault", "requests", "sentence"),
    [
        ("flip", 4, r"bytes with SHA-256 \w{12} arrived where its index says \d+ with \w{12} \(4 attempts\)"),
        ("other", 4, r"it is longer than the \d+ bytes that its index says \(4 attempts\)"),
        ("silent", 4, r"the server was silent for 0\.1 s \(4 attempts\)"),
        (500, 4, r"the server answers 500 Internal Server Error \(4 attempts\)"),
        (404, 1, r"the server answers 404 Not Found \(one attempt\)"),
        (403, 1, r"the server answers 403 Forbidden \(one attempt\)"),
    ],
)
def test_what_never_comes_right_is_named_and_left_nowhere(server, policy, fault, requests, sentence, tmp_path):
    dataset = open_split(server.url, "train", policy=policy(timeout_seconds=0.1))
    server.faults["000002.tar"] = ["always", fault]
    with pytest.raises(
        ReadError, match=rf"sample 120 cannot be read: http.*/tokens/train/000002\.tar cannot be fetched: .*{sentence}; mend"
    ):
        dataset[120]
    assert len(server.asked_for("000002.tar")) == requests
    assert [file.suffix for file in cached(tmp_path, "*000002.tar*")] == [".lock"]


def test_a_connection_that_breaks_again_and_again_still_brings_the_file_home(server, folder, policy):
    server.faults["000000.tar"] = ["cut"] * 3
    dataset = open_split(server.url, "train", policy=policy(retries=3))
    assert tokens(dataset, [49]) == tokens(open_split(folder, "train"), [49])
    assert server.asked_for("000000.tar")[1:] == sorted(server.asked_for("000000.tar")[1:])


def test_what_cannot_be_fetched_is_left_out_without_asking_for_each_sample(server, folder, policy, caplog):
    dataset = open_split(server.url, "train", policy=policy(on_error="skip"))
    server.faults["000001.tar"] = ["always", 503]
    rows = [dataset.__getitems__([number, 100]) for number in range(50, 60)]
    assert [row.skipped for row in rows] == [1] * 10
    assert sum(row.retries for row in rows) == 3
    assert len(server.asked_for("000001.tar")) == 4
    assert len(caplog.messages) == 1
    assert rows[3].tokens[1].tolist() == tokens(open_split(folder, "train"), [100])[0][0]


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (b'{"format_version": ', r"what http.*/tokens/train/index\.json gave cannot be used: .*index\.json is damaged"),
        ({"fingerprint": "../../x"}, r"tokens/train/index\.json is damaged: it names the shard '\.\./\.\./x'"),
        ({"samples": 0}, r"tokens/train holds no samples"),
    ],
    ids=["cut", "leads elsewhere", "empty"],
)
def test_an_index_that_cannot_be_is_refused(server, folder, policy, index, sentence):
    file = folder / "train" / "index.json"
    file.write_bytes(index if isinstance(index, bytes) else json.dumps(json.loads(file.read_text()) | index).encode())
    with pytest.raises(ValueError, match=sentence):
        open_split(server.url, "train", policy=policy())


def test_a_shard_whose_name_leads_elsewhere_is_refused(server, folder, policy):
    file = folder / "train" / "index.json"
    file.write_text(file.read_text().replace("000001.tar", "../../../000001.tar"))
    with pytest.raises(ValueError, match=r"is damaged: it names the shard '\.\./\.\./\.\./000001\.tar'"):
        open_split(server.url, "train", policy=policy())


def test_what_is_not_there_is_said_at_once(server, policy):
    with pytest.raises(LostError, match=r"/tokens/test/index\.json cannot be fetched: the server answers 404 Not Found \(one attempt\)"):
        open_split(server.url, "test", policy=policy())


def test_a_server_that_is_not_there_is_said_after_all_attempts(server, policy):
    server.shutdown()
    server.server_close()
    with pytest.raises(LostError, match=r"index\.json cannot be fetched: Connection refused \(4 attempts\)"):
        open_split(server.url, "train", policy=policy())


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("pipe:cat /tokens", r"'pipe:cat /tokens' has no \{\}, where the name of a file goes"),
        ("https://me:secret@host/tokens", r"the path of host holds a user's name"),
    ],
)
def test_a_path_that_cannot_work_is_refused(policy, path, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        open_split(path, "train", policy=policy())
    assert "secret" not in str(error.value)


def test_a_query_goes_behind_each_name_and_into_no_message(server, policy):
    dataset = open_split(f"{server.url}/?signature=secret", "train", policy=policy())
    dataset[0]
    assert [path for path, _ in server.requests] == [f"/tokens/train/{name}?signature=secret" for name in FILES[:2]]
    server.faults["000001.tar"] = [404]
    with pytest.raises(ReadError) as error:
        dataset[50]
    assert "secret" not in str(error.value)
    assert dataset.where == f"{server.url}/train"
    assert open_split(f"{server.url}?signature=renewed", "train", policy=policy()).directory == dataset.directory


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("cat {}.not", r"No such file or directory \(4 attempts\)"),
        ("echo bytes; echo a >&2; echo why >&2; exit 3; {}", r"the command ended with status 3: why \(4 attempts\)"),
        ("no_such_command_at_all {}", r"the command ended with status 127: .*not found \(one attempt\)"),
        ("sleep 60; cat {}", r"the command was silent for 0\.2 s \(4 attempts\)"),
        ("exec >&-; sleep 60; {}", r"the command closed its output and did not end for 0\.2 s \(4 attempts\)"),
        ("kill -9 $$; {}", r"the command ended with status -9 \(4 attempts\)"),
    ],
)
def test_a_command_that_fails_or_hangs_is_named_with_what_it_said(policy, command, sentence):
    with pytest.raises(LostError, match=sentence):
        open_split(f"pipe:{command}", "train", policy=policy(timeout_seconds=0.2))


def test_a_command_that_hangs_is_ended_with_all_that_it_started(policy, tmp_path):
    command = f"pipe:sleep 60 & echo $! > {tmp_path}/child; wait; echo {{}}"
    with pytest.raises(LostError, match="silent"):
        open_split(command, "train", policy=policy(timeout_seconds=0.3, retries=0))
    assert not is_running(int((tmp_path / "child").read_text()))


def test_a_command_that_writes_on_and_on_is_ended(folder, policy):
    endless = f"pipe:cat {folder}/{{}}; case {{}} in *.tar) cat {folder}/{{}}; sleep 60; esac"
    dataset = open_split(endless, "train", policy=policy(retries=0))
    began = time.monotonic()
    with pytest.raises(ReadError, match="it is longer than the"):
        dataset[0]
    assert time.monotonic() - began < 30


def is_running(process):
    """Ended processes without a parent to wait for them may stay as zombies."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_command_that_fails_after_its_bytes_is_tried_again(folder, policy, tmp_path):
    remote = open_split(f"{pipe_from(folder)}; mkdir -p {tmp_path}/seen/train; ! mkdir {tmp_path}/seen/{{}}", "train", policy=policy())
    rows = remote.__getitems__([60])
    assert rows.tokens.tolist() == tokens(open_split(folder, "train"), [60])[0]
    assert rows.retries == 1


def read_in_a_process(url, policy, barrier, results):
    dataset = open_split(url, "train", policy=policy)
    barrier.wait()
    results.put(tokens(dataset))


def test_several_processes_fetch_each_shard_once_between_them(server, folder, policy):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    readers = [context.Process(target=read_in_a_process, args=(server.url, policy(), barrier, results)) for _ in range(3)]
    for reader in readers:
        reader.start()
    assert [results.get(timeout=60) for _ in readers] == [tokens(open_split(folder, "train"))] * 3
    for reader in readers:
        reader.join()
    assert [len(server.asked_for(name)) for name in FILES[1:]] == [1] * 5


def test_what_a_killed_process_left_half_done_is_fetched_anew(server, folder, policy, tmp_path):
    server.faults["000000.tar"] = ["silent"]
    context = multiprocessing.get_context("fork")
    reader = context.Process(target=read_in_a_process, args=(server.url, policy(), context.Barrier(1), context.Queue()))
    reader.start()
    while not server.asked_for("000000.tar"):
        time.sleep(0.01)
    os.kill(reader.pid, signal.SIGKILL)
    reader.join()
    (half,) = cached(tmp_path, "*.unfinished")
    half.write_bytes((folder / "train" / "000000.tar").read_bytes()[:-1])
    assert tokens(open_split(server.url, "train", policy=policy())) == tokens(open_split(folder, "train"))
    assert cached(tmp_path, "*.unfinished") == []


@pytest.mark.parametrize("verify", ["size", "hash"])
def test_a_bad_copy_in_the_cache_is_fetched_again_once(server, folder, policy, tmp_path, verify):
    tokens(open_split(server.url, "train", policy=policy()))
    index = open_split(folder, "train").index
    position = index.first_offset if verify == "hash" else 0  # a token that could be one, and a name that could not
    with cached(tmp_path)[1].open("r+b") as file:
        file.seek(position)
        file.write(b"!")
    fresh = open_split(server.url, "train", policy=policy(verify=verify))
    assert tokens(fresh, [50, 51]) == tokens(open_split(folder, "train"), [50, 51])
    assert len(server.asked_for("000001.tar")) == 2


def test_a_copy_in_the_cache_outlives_a_disk_that_fails_for_once(server, folder, policy, monkeypatch):
    tokens(open_split(server.url, "train", policy=policy()))
    dataset, pread, failed = open_split(server.url, "train", policy=policy()), os.pread, []

    def fails_once(*arguments):
        if not failed:
            failed.append(arguments)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", fails_once)
    assert tokens(dataset, [50]) == tokens(open_split(folder, "train"), [50])
    assert failed
    assert len(server.asked_for("000001.tar")) == 1


def test_a_copy_that_was_checked_is_not_fetched_again_for_a_sample_that_is_bad_at_its_source(server, folder, policy):
    tar, index = folder / "train" / "000001.tar", folder / "train" / "index.json"
    before = tar.read_bytes()
    tar.write_bytes(b"!" + before[1:])
    old, new = (hashlib.sha256(data).hexdigest() for data in (before, tar.read_bytes()))
    index.write_text(index.read_text().replace(old, new))
    dataset = open_split(server.url, "train", policy=policy(on_error="skip"))
    assert dataset.__getitems__([50, 50, 51]).skipped == 2
    assert len(server.asked_for("000001.tar")) == 1


def test_other_data_at_the_same_place_is_another_folder_of_the_cache(server, folder, policy):
    first = tokens(open_split(server.url, "train", policy=policy()))
    write_shards([TEXT[::-1]], folder / "train", tokenizer=ByteTokenizer(), sequence_length=128, samples_per_shard=50, overwrite=True)
    second = tokens(open_split(server.url, "train", policy=policy()))
    assert first != second == tokens(open_split(folder, "train"))


def test_the_cache_lets_go_of_what_was_not_opened_for_longest(server, folder, policy, tmp_path):
    size = (folder / "train" / "000000.tar").stat().st_size
    limited = policy(cache_gib=2.5 * size / 2**30)
    reference = open_split(folder, "train")
    dataset = open_split(server.url, "train", policy=limited)
    assert tokens(dataset, [0, 50]) == tokens(reference, [0, 50])
    for file, opened in zip(cached(tmp_path), (200, 100), strict=True):
        os.utime(file, (opened, opened))
    assert tokens(dataset, [100]) == tokens(reference, [100])
    assert [file.name for file in cached(tmp_path)] == ["000000.tar", "000002.tar"]
    assert tokens(dataset, [51]) == tokens(reference, [51])  # still open
    assert tokens(open_split(server.url, "train", policy=limited), [0, 60]) == tokens(reference, [0, 60])
    assert [file.name for file in cached(tmp_path)] == ["000000.tar", "000001.tar"]


def test_made_shards_in_the_same_cache_are_none_of_the_room(server, policy, tmp_path):
    made = tmp_path / "cache" / "made" / "000000.tar"
    made.parent.mkdir(parents=True)
    made.write_bytes(b"made of others' tars")
    tokens(open_split(server.url, "train", policy=policy(cache_gib=1e-9)))
    assert made.exists()
    assert len(cached(tmp_path)) == 2


def test_a_full_disk_is_raised_whatever_the_policy_says(server, policy, monkeypatch):
    dataset = open_split(server.url, "train", policy=policy(on_error="skip"))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("titans_scale.data.files.os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*000000\.tar'"):
        dataset[0]
    assert len(server.asked_for("000000.tar")) == 1


def fetch_ahead(dataset, numbers):
    """And wait for it."""
    before = set(threading.enumerate())
    dataset.prefetch(numbers)
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=30)


def test_shards_are_fetched_ahead_in_the_order_asked_for(server, folder, policy):
    dataset = open_split(server.url, "train", policy=policy())
    fetch_ahead(dataset, [120, 0, 121])
    assert [path.rpartition("/")[2] for path, _ in server.requests] == ["index.json", "000002.tar", "000000.tar"]
    assert tokens(dataset, [0, 120]) == tokens(open_split(folder, "train"), [0, 120])
    assert len(server.requests) == 3
    open_split(folder, "train").prefetch([0, 1])  # nothing to fetch


def test_what_another_process_is_fetching_is_left_to_it(server, policy, tmp_path):
    dataset = open_split(server.url, "train", policy=policy())
    dataset.directory.mkdir(parents=True)
    server.faults["000000.tar"] = [500]
    with FileLock(dataset.directory / ".000002.tar.lock"):
        fetch_ahead(dataset, [120, 0])
    assert [file.name for file in cached(tmp_path)] == ["000000.tar"]
    assert not server.asked_for("000002.tar")
    assert (dataset.take_retries(), dataset.take_retries()) == (1, 0)


def test_what_could_not_be_fetched_ahead_is_told_by_the_read_that_needs_it(server, policy):
    dataset = open_split(server.url, "train", policy=policy(retries=0))
    server.faults["000000.tar"] = [404, 403]
    fetch_ahead(dataset, [0, 50])
    assert server.asked_for("000001.tar")
    with pytest.raises(ReadError, match="403"):
        dataset[0]


def test_a_remote_split_goes_to_worker_processes(server, folder, policy):
    dataset = pickle.loads(pickle.dumps(open_split(server.url, "train", policy=policy())))
    server.faults["000001.tar"] = [500]
    loader = DataLoader(dataset, batch_sampler=[SAMPLES[:3], SAMPLES[3:]], num_workers=2, collate_fn=lambda rows: rows)
    rows = list(loader)
    assert [row for batch in rows for row in batch.tokens.tolist()] == tokens(open_split(folder, "train"))[0]
    assert sum(batch.retries for batch in rows) == 1


def test_the_tokenizer_comes_along(server, folder, policy, tmp_path):
    tokenizer = train_sentencepiece(["some words " * 20], tmp_path / "made.model", 266)
    write_shards(["some words"], folder / "train", tokenizer=tokenizer, sequence_length=8, overwrite=True)
    server.faults["tokenizer.model"] = ["cut"]
    loaded = open_split(server.url, "train", policy=policy()).load_tokenizer()
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("some words") == tokenizer.encode("some words")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("../.$(touch {folder}/here)", r"'\.\$\(touch .*/here\)' cannot be fetched"),
        (
            "../../../etc/passwd",
            r"names the file '\.\./\.\./\.\./etc/passwd', which lies outside the dataset's folder",
        ),
    ],
)
def test_a_tokenizer_whose_name_is_a_trick_runs_and_reads_nothing(folder, policy, name, sentence):
    file = folder / "train" / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer": name.format(folder=folder)}))
    with pytest.raises(ValueError, match=sentence):
        open_split(pipe_from(folder), "train", policy=policy()).load_tokenizer()
    assert not (folder / "here").exists()


def test_a_hugging_face_tokenizer_comes_with_the_name_of_its_end_of_document(server, folder, policy, tmp_path):
    package = pytest.importorskip("tokenizers")
    (tmp_path / "made").mkdir()
    made = package.Tokenizer(package.models.WordLevel({"some": 0, "words": 1, "unknown": 2}, unk_token="unknown"))
    made.pre_tokenizer = package.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<end>"])
    made.save(str(tmp_path / "made" / "tokenizer.json"))
    (tmp_path / "made" / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    tokenizer = load_tokenizer(tmp_path / "made")
    write_shards(["some words"], folder / "train", tokenizer=tokenizer, sequence_length=8, overwrite=True)
    loaded = open_split(server.url, "train", policy=policy()).load_tokenizer()
    assert (loaded.fingerprint, loaded.eos_id) == (tokenizer.fingerprint, 3)


def test_a_file_of_others_is_fetched_once_and_kept(server, folder, policy, tmp_path):
    server.faults["000000.tar"] = ["cut"]
    for _ in range(2):
        file = fetch_file(f"{server.url}/train/000000.tar?signature=secret", tmp_path / "tars", policy())
        assert file.name.endswith("-000000.tar")
        assert file.read_bytes() == (folder / "train" / "000000.tar").read_bytes()
    assert len(server.requests) == 2
    server.faults["000001.tar"] = [404]
    with pytest.raises(LostError, match=r"/train/000001\.tar cannot be fetched: the server answers 404"):
        fetch_file(f"{server.url}/train/000001.tar", tmp_path / "tars", policy())
    assert len([file for file in (tmp_path / "tars").iterdir() if not file.name.endswith(".lock")]) == 1


@pytest.mark.parametrize(
    ("command", "ending"),
    [("cat {file}", "a.tar"), ("cat {file}.gz", "a.tar.gz"), ("gzip -dc < {file}.gz", "a.tar"), ("echo no name", "-file")],
)
def test_a_kept_file_is_named_by_what_it_holds(policy, tmp_path, command, ending):
    (tmp_path / "a.tar").write_bytes(bytes(1024))
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(1024)))
    location = f"pipe:{command.format(file=tmp_path / 'a.tar')}"
    file = fetch_file(location, tmp_path / "tars", policy())
    assert file.name.endswith(ending)
    assert fetch_file(location, tmp_path / "tars", policy()) == file
    assert len(file.read_bytes()) == (8 if ending == "-file" else len((tmp_path / ending).read_bytes()))


def test_the_cache_lies_where_the_user_keeps_such(server, policy, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert open_split(server.url, "train", policy=policy(cache_dir=None)).directory.is_relative_to(tmp_path / "mine" / "titans_scale")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_split(server.url, "train", policy=policy(cache_dir=None)).directory.is_relative_to(tmp_path / "home/.cache/titans_scale")
