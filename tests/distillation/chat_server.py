"""A chat server of our own that can be slow, broken or dead."""

import json
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def user(*texts: str, name: str = "p", split: str = "train") -> dict:
    """A row of prompts with these user turns."""
    return dict(id=name, split=split, messages=[dict(role="user", content=text) for text in texts])


def completion(text, finish_reason="stop", **more) -> dict:
    """A well-formed answer; ``more`` goes into the message."""
    choice = dict(index=0, message=dict(role="assistant", content=text) | more, finish_reason=finish_reason)
    usage = dict(prompt_tokens=5, completion_tokens=3, total_tokens=8)
    return dict(id="x", object="chat.completion", created=0, model="m", choices=[choice], usage=usage)


class Chat(BaseHTTPRequestHandler):
    """Answers with the number of messages and the last user turn, unless the server's ``behave`` does otherwise."""

    protocol_version = "HTTP/1.1"
    server: "ChatServer"

    def do_GET(self):
        self.server.looked += 1
        if self.server.dead:
            return self.reset()
        self.send(200, b'{"object": "list", "data": []}')

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.dead:
            return self.reset()
        with self.server.lock:
            self.server.seen.append(request)
        answer = self.server.behave(self, request)
        if answer is not None:
            self.send(200, json.dumps(answer).encode())

    def send(self, status: int, body: bytes, length: int | None = None, kind: str = "application/json", **headers):
        self.send_response(status)
        headers = {"content-type": kind, "content-length": str(length or len(body)), **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = length is not None

    def reset(self):
        """Close the connection the hard way."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *arguments):
        pass

    def handle(self):
        try:
            super().handle()
        except (OSError, ValueError):  # the client has gone, or we have
            pass


class ChatServer(ThreadingHTTPServer):
    """``behave(handler, request)`` returns an answer, or answers itself and returns None."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), Chat)
        self.behave, self.lock, self.seen, self.looked, self.dead = behave, threading.Lock(), [], 0, False
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()

    def handle_error(self, *arguments):
        pass


def echo(handler, request) -> dict:
    """The number of messages and the last user turn."""
    return completion(f"{len(request['messages'])} {request['messages'][-1]['content']}")
