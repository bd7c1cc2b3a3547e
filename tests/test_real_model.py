"""What the studies on a pretrained model start from: its folder, and their prompts."""

import hashlib
import json
import re

import pytest

from benchmarks.real_model import folder, prompts


def test_worked_sums_are_right_whatever_their_way():
    ways = set()
    for row in prompts.rows("sums", 300):
        numbers = [int(x) for x in re.findall(r"\d+", row["prompt"])]
        assert len(numbers) == 3
        assert row["answer"] == str(sum(numbers))
        assert row["worked"].endswith(f" The answer is {row['answer']}.")
        for left, right in re.findall(r"([\d+ ]+) = (\d+)", row["worked"]):
            assert sum(map(int, left.split(" + "))) == int(right)
        ways.add(row["worked"].split()[0])
    assert ways == {"Start", "The", "Tens:"}


def test_the_files_are_the_same_each_time_and_have_all_kinds(tmp_path):
    for name in ("one", "two"):
        prompts.write(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(f"{kind}.jsonl" for kind in ("sums", *prompts.KINDS))
    for name in files:
        text = (tmp_path / "one" / name).read_text()
        assert text == (tmp_path / "two" / name).read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert len(rows) == (prompts.SUMS if name == "sums.jsonl" else prompts.PROMPTS)
        assert all(row["prompt"] and row["answer"] for row in rows)


def test_word_problems_have_the_answer_of_their_numbers():
    for row in prompts.rows("word-problems", 50):
        have, more, times = (int(x) for x in re.findall(r"\d+", row["prompt"]))
        assert row["answer"] == str(have + more * times)


@pytest.mark.parametrize("trouble", ["no file", "a folder that exists", "another file"])
def test_what_is_no_gguf_file_of_the_model_is_told(trouble, tmp_path, capsys):
    file, target = tmp_path / "model.gguf", tmp_path / "model"
    wanted = {
        "no file": "FILE must be a GGUF file; got ",
        "a folder that exists": "FOLDER must not exist yet; got ",
        "another file": f"FILE must have the SHA-256 {folder.GEMMA}; got "
        + hashlib.sha256(b"GGUF").hexdigest(),
    }[trouble]
    if trouble != "no file":
        file.write_bytes(b"GGUF")
    if trouble == "a folder that exists":
        target.mkdir()
    with pytest.raises(SystemExit) as stopped:
        folder.main([str(file), str(target)])
    assert stopped.value.code == 2
    assert wanted in capsys.readouterr().err
    assert target.exists() is (trouble == "a folder that exists")
