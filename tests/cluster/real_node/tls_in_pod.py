"""Asks servers with and without certificates; runs in a pod.

    tls_in_pod.py QUESTIONS [FINGERPRINT]

QUESTIONS is a JSON list of objects: `address` (HOST:PORT), `head` (of an HTTP request; empty
only connects), `folder` (with the certificate to show; empty shows none) and `is_plain` (without
TLS). The termination message has the first line of each answer, `closed` where there is none. With
a FINGERPRINT, asks until all servers show the certificate with that SHA-256.
"""

import hashlib
import json
import socket
import ssl
import sys
import time

TIMEOUT_S = 20.0
POLL_S = 1.0
ROTATION_S = 280.0
TERMINATION_LOG = "/dev/termination-log"


def connect(address: str) -> socket.socket:
    """Return a connection to HOST:PORT."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=TIMEOUT_S)


def client_context(folder: str) -> ssl.SSLContext:
    """Return the context of a client that verifies nobody, and shows a folder's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if folder:
        context.load_cert_chain(f"{folder}/tls.crt", f"{folder}/tls.key")
    return context


def ask(address: str, head: str, folder: str, is_plain: bool) -> str:
    """Return the first line of the answer; `closed` if there is none."""
    try:
        with connect(address) as plain:
            if is_plain:
                return exchange(plain, head)
            with client_context(folder).wrap_socket(plain) as secured:
                return exchange(secured, head)
    except (ConnectionError, ssl.SSLError):
        return "closed"


def exchange(connection: socket.socket, head: str) -> str:
    """Send a head and return the first line of the answer."""
    connection.sendall(head.encode())
    answer = b""
    while b"\r\n" not in answer:
        data = connection.recv(1 << 16)
        if not data:
            break
        answer += data
    line = answer.partition(b"\r\n")[0]
    return line.decode("latin-1") if line.startswith(b"HTTP/") else "closed"


def fingerprint(address: str) -> str:
    """Return the SHA-256 of the certificate that a server shows; empty if it shows none."""
    try:
        with connect(address) as plain, client_context("").wrap_socket(plain) as secured:
            return hashlib.sha256(secured.getpeercert(binary_form=True) or b"").hexdigest()
    except OSError:
        return ""


def wait_for(addresses: list[str], expected: str) -> None:
    """Wait until all servers show a certificate."""
    deadline_s = time.monotonic() + ROTATION_S
    while missing := [address for address in addresses if fingerprint(address) != expected]:
        if time.monotonic() > deadline_s:
            raise SystemExit(f"not within {ROTATION_S:g} s: {missing}")
        time.sleep(POLL_S)


def main(questions: str, expected: str = "") -> None:
    """Ask, and write the answers to the termination log."""
    parsed = json.loads(questions)
    if expected:
        wait_for([question["address"] for question in parsed], expected)
    answers = [ask(**question) for question in parsed]
    with open(TERMINATION_LOG, "w") as log:
        json.dump(answers, log)


if __name__ == "__main__":
    main(*sys.argv[1:])
