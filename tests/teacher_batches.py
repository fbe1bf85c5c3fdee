"""Files and batches of an OpenAI-compatible endpoint, for `teacher_server`.

https://platform.openai.com/docs/api-reference/batch has the shapes. Time is what polls make of it:
a batch goes on by one step whenever it is looked at (validating, in_progress, finalizing, and
completed, expired or failed), so that a test need not wait.
"""

import collections
import itertools
import json
import random
import re
import time
from collections.abc import Callable, Iterator

from teacher_faults import Refused, Reply, error

RESTS = {
    "batch_expired": "This request could not be executed before the completion window expired.",
    "batch_cancelled": "This request was not executed: the batch was cancelled.",
}


def json_reply(value: dict) -> Reply:
    return Reply(200, json.dumps(value).encode())


def json_object(body: bytes) -> dict:
    """The object in a request's body."""
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Refused(error(400, "We could not parse the JSON body of your request."))
    return value


def listed(items: list[dict], query: dict[str, str]) -> dict:
    """The page of a list that `limit` and `after` ask for."""
    ids = [item["id"] for item in items]
    if "after" in query:
        if query["after"] not in ids:
            raise Refused(error(404, f"No object with id {query['after']!r}"))
        items = items[ids.index(query["after"]) + 1 :]
    limit = int(query.get("limit", 20))
    shown = items[:limit]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {}
    return {"object": "list", "data": shown, **ends, "has_more": len(items) > limit}


class Batches:
    """The files and batches of one server.

    Args:
      answer: (endpoint, line of a batch, its batch) -> status and JSON of the response; bought if
        the status is 200.
      endpoints: that there are.
    """

    def __init__(self, answer: Callable[[str, dict, dict], tuple[int, dict]], endpoints):
        self._answer = answer
        self._endpoints = endpoints
        self._stored: dict[str, tuple[dict, bytes]] = {}
        self._batches: dict[str, dict] = {}
        self._lines: dict[str, list[dict]] = {}
        self._polls: collections.Counter = collections.Counter()
        self._numbers = itertools.count(1)

    def handle(self, request, query: dict[str, str], settings) -> Reply | None:
        """Answers a request for a file or a batch; None if it is for neither.

        Args:
          request: `teacher_server.Request`.
          query: its fields.
          settings: `teacher_server.Settings`.
        """
        match [request.method, *request.path.split("/")[2:]]:
            case ["POST", "files"]:
                return json_reply(self._upload(request))
            case ["GET", "files", name]:
                return json_reply(self._file(name)[0])
            case ["GET", "files", name, "content"]:
                return Reply(200, self._file(name)[1], {"Content-Type": "application/octet-stream"})
            case ["DELETE", "files", name]:
                self._file(name)
                del self._stored[name]
                return json_reply({"id": name, "object": "file", "deleted": True})
            case ["POST", "batches"]:
                return json_reply(self._create(json_object(request.body)))
            case ["GET", "batches"]:
                return json_reply(listed(list(self._batches.values())[::-1], query))
            case ["GET", "batches", name]:
                self._go_on(self._batch(name), settings)
                return json_reply(self._batch(name))
            case ["POST", "batches", name, "cancel"]:
                return json_reply(self._cancel(self._batch(name)))
        return None

    def _file(self, name: str) -> tuple[dict, bytes]:
        if name not in self._stored:
            raise Refused(error(404, f"No such File object: {name}"))
        return self._stored[name]

    def _batch(self, name: str) -> dict:
        if name not in self._batches:
            raise Refused(error(404, f"No batch found with id '{name}'."))
        return self._batches[name]

    def _store(self, content: bytes, filename: str, purpose: str) -> dict:
        name = f"file-{next(self._numbers):06d}"
        about = {
            "id": name, "object": "file", "bytes": len(content), "created_at": int(time.time()),
            "filename": filename, "purpose": purpose, "status": "processed", "expires_at": None,
            "status_details": None,
        }  # fmt: skip
        self._stored[name] = about, content
        return about

    def _upload(self, request) -> dict:
        parts = dict(form(request.headers.get("content-type", ""), request.body))
        if "file" not in parts or parts.get("purpose", (None, b""))[1] != b"batch":
            raise Refused(error(400, "a file and the purpose `batch` are needed"))
        filename, content = parts["file"]
        return self._store(content, filename or "upload", "batch")

    def _create(self, body: dict) -> dict:
        endpoint, window, file = map(
            body.get, ("endpoint", "completion_window", "input_file_id")
        )  # fmt: skip
        if endpoint not in self._endpoints:
            raise Refused(error(400, f"Invalid endpoint: {endpoint!r}"))
        if window != "24h":
            raise Refused(error(400, f"Invalid completion_window: {window!r}"))
        self._file(file)
        name, now = f"batch_{len(self._batches) + 1:06d}", int(time.time())
        self._batches[name] = {
            "id": name, "object": "batch", "endpoint": endpoint, "errors": None,
            "input_file_id": file, "completion_window": window, "status": "validating",
            "output_file_id": None, "error_file_id": None, "created_at": now,
            "in_progress_at": None, "expires_at": now + 24 * 3600, "finalizing_at": None,
            "completed_at": None, "failed_at": None, "expired_at": None, "cancelling_at": None,
            "cancelled_at": None, "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": body.get("metadata"), "usage": None,
        }  # fmt: skip
        return self._batches[name]

    def _cancel(self, batch: dict) -> dict:
        if batch["status"] not in ("validating", "in_progress", "finalizing"):
            status = batch["status"]
            raise Refused(error(409, f"Cannot cancel a batch with status '{status}'."))
        return _enter(batch, "cancelling")

    def _go_on(self, batch: dict, settings) -> None:
        name, counts = batch["id"], batch["request_counts"]
        match batch["status"]:
            case "validating":
                lines, errors = self._read(batch)
                if settings.batch_outcome == "failed" and not errors:
                    errors = [_problem("token_limit_exceeded", "Enqueued token limit reached.")]
                if errors:
                    batch["errors"] = {"object": "list", "data": errors}
                    _enter(batch, "failed")
                else:
                    self._lines[name] = lines
                    counts["total"] = len(lines)
                    _enter(batch, "in_progress")
            case "in_progress":
                self._polls[name] += 1
                if self._polls[name] < settings.batch_polls:
                    share = self._polls[name] / settings.batch_polls
                    counts["completed"] = int(counts["total"] * share)
                elif settings.batch_outcome == "expired":
                    self._run(batch, settings.batch_share, "batch_expired", settings)
                    _enter(batch, "expired")
                else:
                    _enter(batch, "finalizing")
            case "finalizing":
                self._run(batch, 1.0, "batch_expired", settings)
                _enter(batch, "completed")
            case "cancelling":
                share = counts["completed"] / max(counts["total"], 1)
                self._run(batch, share, "batch_cancelled", settings)
                _enter(batch, "cancelled")

    def _read(self, batch: dict) -> tuple[list[dict], list[dict]]:
        """The requests of a batch, and what is wrong with its file."""
        lines, errors, seen = [], [], set()
        texts = self._file(batch["input_file_id"])[1].splitlines()
        if not texts:
            errors = [_problem("empty_file", "The input file is empty.")]
        for number, text in enumerate(texts, 1):
            try:
                line = json.loads(text)
            except ValueError:
                errors.append(_problem("invalid_json_line", "It is not valid JSON.", number))
                continue
            if not isinstance(line, dict) or not isinstance(line.get("body"), dict):
                errors.append(_problem("missing_required_parameter", "No 'body'.", number))
            elif (line.get("method"), line.get("url")) != ("POST", batch["endpoint"]):
                errors.append(_problem("mismatched_endpoint", "Not the batch's.", number))
            elif not isinstance(line.get("custom_id"), str) or line["custom_id"] in seen:
                errors.append(_problem("duplicate_custom_id", "Missing, or not unique.", number))
            else:
                seen.add(line["custom_id"])
                lines.append(line)
        return lines, errors

    def _run(self, batch: dict, share: float, rest: str, settings) -> None:
        """Answers a share of the lines, in another order, and writes the two files.

        Args:
          batch: to write the files and counts into.
          share: fraction of the lines, in [0, 1].
          rest: the code of the errors of the others.
          settings: `teacher_server.Settings`.
        """
        lines = list(self._lines.get(batch["id"], ()))
        random.Random(f"{settings.seed}/{batch['id']}").shuffle(lines)
        cut = round(len(lines) * share)
        output, errors = [], []
        tokens: collections.Counter = collections.Counter()
        for number, line in enumerate(lines):
            about = {"id": f"batch_req_{batch['id']}_{number}", "custom_id": line["custom_id"]}
            if number >= cut:
                failed = {"code": rest, "message": RESTS[rest]}
                errors.append(json.dumps({**about, "response": None, "error": failed}))
                continue
            status, body = self._answer(batch["endpoint"], line, batch)
            response = {"status_code": status, "request_id": f"req_{number}", "body": body}
            (output if status == 200 else errors).append(
                json.dumps({**about, "response": response, "error": None})
            )
            tokens.update(_counted(body.get("usage")))
        batch["request_counts"].update(
            total=len(lines), completed=len(output), failed=len(errors)
        )  # fmt: skip
        batch["usage"] = {
            "input_tokens": tokens["prompt_tokens"], "output_tokens": tokens["completion_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": tokens["prompt_tokens"] + tokens["completion_tokens"],
        }  # fmt: skip
        if output and settings.batch_garbage:
            stranger = json.dumps({**json.loads(output[0]), "custom_id": "never-asked"})
            output += [output[0], stranger, "", output[-1][: len(output[-1]) // 2]]
        for field, content in (("output_file_id", output), ("error_file_id", errors)):
            if content:
                text = "".join(f"{line}\n" for line in content).encode()
                filename = f"{batch['id']}_{field.removesuffix('_file_id')}.jsonl"
                batch[field] = self._store(text, filename, "batch_output")["id"]


def _enter(batch: dict, status: str) -> dict:
    batch.update({"status": status, f"{status}_at": int(time.time())})
    return batch


def _problem(code: str, message: str, line: int | None = None) -> dict:
    return {"code": code, "message": message, "line": line, "param": None}


def _counted(usage) -> dict[str, int]:
    """The counts in a usage that are counts."""
    fields = usage.items() if isinstance(usage, dict) else ()
    return {name: value for name, value in fields if isinstance(value, int) and value > 0}


def form(content_type: str, body: bytes) -> Iterator[tuple[str, tuple[str | None, bytes]]]:
    """The parts of multipart/form-data: name -> (file name, content)."""
    found = re.search(r'boundary="?([^";]+)', content_type)
    if not found:
        return
    for part in body.split(b"--" + found[1].encode())[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        fields = dict(re.findall(r'(\w+)="([^"]*)"', head.decode()))
        if "name" in fields:
            yield fields["name"], (fields.get("filename"), content.removesuffix(b"\r\n"))
