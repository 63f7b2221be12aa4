"""The harness fails where a page is wrong."""

from __future__ import annotations

import subprocess
import textwrap
import time
from pathlib import Path

import pytest
from blocks import BlockError, links, read_blocks, run_page
from checks import check_file

from commopt.errors import ConfigError


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "page.md"


def _run(page: Path, text: str, limit_s: float = 60.0) -> int:
    page.write_text(textwrap.dedent(text), encoding="utf-8")
    return run_page(page, page.parent / "reader", limit_s)


def test_blocks_run_in_order_and_share_one_python(page: Path) -> None:
    ran = _run(
        page,
        """
        ```python
        import os, pickle
        class Kept: pass
        kept, pid = Kept(), os.getpid()
        open("made", "w").write(pickle.dumps(kept).hex())
        ```

        ```bash
        test -e made && test -e configs/runs/demo.yaml
        mv made moved
        ```

        - in a list

          ```python
          assert os.getpid() == pid and type(pickle.loads(bytes.fromhex(open("moved").read()))) is Kept
          ```

        ```text
        what it printed
        ```
        """,
    )
    assert ran == 3


def test_a_failing_python_block_is_named_by_its_line(page: Path) -> None:
    with pytest.raises(BlockError, match=r"page\.md:3: (?s:.*)line 5, in <module>(?s:.*)ZeroDivisionError"):
        _run(page, "\n\n```python\nx = 0\n1 / x\n```\n")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("false\ntrue", "exit status 1"),
        ("false | true", "exit status 1"),
        ("echo $UNKNOWN", "unbound variable"),
        ("no-such-program", "command not found"),
        ("pip install '.[lightening]'", "commopt has no extra 'lightening'"),
        ("pip install 'commopt[mpi]'", "is not a checkout of commopt"),
        ("sbatch configs/runs/demo.yaml", "does not begin with #!"),
        ("sbatch --nodes=2 missing.sbatch", "'missing.sbatch': no such file"),
        ("kubectl apply -f configs/clusters/lab.yaml", "is a cluster, no manifest"),
        ("docker build -t commopt missing", "'missing' is not a folder to build in"),
        ("ssh a0 'if true'", "syntax error"),
    ],
)
def test_a_failing_bash_block_fails(page: Path, code: str, why: str) -> None:
    with pytest.raises(BlockError, match=rf"page\.md:2: (?s:.*){why}"):
        _run(page, f"\n```bash\n{code}\n```\n")


def test_a_page_that_hangs_is_ended_with_all_that_it_started(page: Path) -> None:
    start = time.monotonic()
    with pytest.raises(BlockError, match=r"page\.md:1: no end after 1 s"):
        _run(page, "```bash\nsetsid sleep 1234.5 & sleep 60\n```\n", limit_s=1.0)
    assert time.monotonic() - start < 30
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "sleep 1234.5" not in found.splitlines()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("```console\n$ true\n```\n", "'console' is no kind of block"),
        ("```\ntrue\n```\n", "'' is no kind of block"),
        ("```yaml\na: 1\n```\n", 'write ```yaml title="name.yaml"'),
        ('```bash title="a.sh"\ntrue\n```\n', "write ```bash without a title"),
        ("```bash\ntrue\n", "never closed"),
        ("text\n\n    true\n", "code by indentation"),
        ("<!-- not executed: for fun -->\n```bash\ntrue\n```\n", "'for fun' is no reason"),
        ('```python title="train.py"\nx = 1\n```\n', "train.py is never run"),
        ('```python title="train.py"\nx =\n```\n\n```bash\npython train.py\n```\n', "invalid syntax"),
        ('```python title="../train.py"\nx = 1\n```\n\n```bash\npython ../train.py\n```\n', "outside of the reader's"),
        ('```yaml title="launch/x.yaml"\nmethod: dgc\n```\n', "outside of the reader's folder"),
        ('```yaml title="x.yaml"\nmethod: dgcc\n```\n', "did you mean 'dgc'"),
        ('```yaml title="x.yaml"\nwhat: dgc\n```\n', "is no kind of file"),
        ("<!-- not executed: takes minutes -->\n```bash\nif true\n```\n", "syntax error"),
        ("<!-- not executed: takes minutes -->\n```python\nx =\n```\n", "invalid syntax"),
        ("```python\nimport os\nos._exit(3)\n```\n", "the process ended with 3"),
    ],
)
def test_a_block_that_is_wrong_fails(page: Path, text: str, why: str) -> None:
    with pytest.raises(BlockError) as raised:
        _run(page, text)
    assert why in str(raised.value)


def test_a_block_with_a_reason_is_not_executed_and_the_next_one_is(page: Path) -> None:
    assert _run(page, "<!-- not executed: takes minutes -->\n```bash\nfalse\n```\n") == 0
    page.write_text("<!-- not executed: takes minutes -->\n\n```bash\nfalse\n```\n\n```bash\ntrue\n```\n")
    assert [block.reason for block in read_blocks(page)] == ["takes minutes", None]


def test_blocks_under_a_tab_are_read(page: Path) -> None:
    page.write_text('=== "DDP"\n\n    ```bash\n    true\n    ```\n\n!!! note\n    Words.\n', encoding="utf-8")
    (block,) = read_blocks(page)
    assert (block.line, block.code) == (3, "true\n")


def test_links_and_pictures_are_found(page: Path) -> None:
    page.write_text("[a](b.md#c) ![d](e.png)\n\n| f |\n|---|\n| [g](h.md) |\n", encoding="utf-8")
    assert links(page) == ["b.md#c", "e.png", "h.md"]


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("a.yaml", "nodes: 2\nlinks: {rate: 50mbit}\n", "cluster"),
        ("a.yaml", "method: {name: dgc, density: 0.01}\n", "method"),
        ("a.json", '{"method": "onebit_adam"}', "method"),
        ("a.json", '{"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "OneBitAdam"}}', "deepspeed"),
        ("a.yaml", "services: {node0: {image: commopt}}\n", "compose"),
    ],
)
def test_a_file_is_known_by_what_it_holds(tmp_path: Path, name: str, text: str, kind: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert check_file(tmp_path / name) == kind


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.yaml", "nodes: 0\n", "0 is not a number of nodes"),
        ("a.yaml", "method: {name: dgc, densty: 1}\n", "did you mean 'density'"),
        ("a.json", '{"train_batch_size": 4, "optimizer": {"type": "OneBitAdm"}}', "optimizer.type: 'OneBitAdm'"),
        ("a.json", '{"train_batch_size": 4, "zero": 1}', "zero: is no key"),
        ("a.json", '{"train_batch_size": 4, "commopt": {"method": "dgc", "densty": 1}}', "did you mean 'density'"),
        ("a.yaml", "services: {node0: {}}\n", "services.node0: has neither"),
        ("a.yaml", "apiVersion: v1\nkind: Pod\n", "a manifest has a kind and a metadata.name"),
        ("a.yaml", "- 1\n", "holds no keys and values"),
    ],
)
def test_a_file_with_a_mistake_is_refused(tmp_path: Path, name: str, text: str, why: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=why):
        check_file(tmp_path / name)
