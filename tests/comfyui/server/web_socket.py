"""As much of a WebSocket client (RFC 6455) as listening to ComfyUI takes."""

import base64
import json
import os
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import Any

TEXT, BINARY, CLOSE, PING = 1, 2, 8, 9


@dataclass(frozen=True, slots=True)
class Event:
    """What the server told. kind: its type, or 'preview' for a picture; data: its JSON, or the picture's bytes."""

    kind: str
    data: Any


class Listener:
    """Collects the server's events from now on, until the context ends."""

    def __init__(self, port: int, client: str) -> None:
        self.events: list[Event] = []
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=600)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET /ws?clientId={client} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._stream = self._socket.makefile("rb")
        status = self._stream.readline()
        assert b"101" in status, status
        while self._stream.readline() not in (b"\r\n", b""):
            pass
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> "Listener":
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._socket.close()

    def of(self, kind: str) -> list[Any]:
        """Data of all events of that kind so far."""
        return [event.data for event in list(self.events) if event.kind == kind]

    def wait_for(self, text: str, seconds: float = 240) -> None:
        """Until a node shows a text that holds this one. Raises AssertionError if none does."""
        deadline = time.monotonic() + seconds
        while not any(text.encode() in told for told in self.of("text")):
            assert time.monotonic() < deadline, f"{text!r} was never told"
            time.sleep(0.02)

    def _read(self) -> None:
        try:
            while frame := self._frame():
                self._take(*frame)
        except (OSError, struct.error, ValueError):
            return  # the server or the test has closed the connection

    def _frame(self) -> tuple[int, bytes] | None:
        kind, size = struct.unpack("!BB", self._stream.read(2))
        if size == 126:
            (size,) = struct.unpack("!H", self._stream.read(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", self._stream.read(8))
        body = self._stream.read(size)
        return None if kind & 15 == CLOSE else (kind & 15, body)

    def _take(self, kind: int, body: bytes) -> None:
        if kind == TEXT:
            message = json.loads(body)
            self.events.append(Event(message["type"], message["data"]))
        elif kind == BINARY:
            (number,) = struct.unpack("!I", body[:4])
            self.events.append(Event({1: "preview", 3: "text"}.get(number, f"binary {number}"), body[4:]))
