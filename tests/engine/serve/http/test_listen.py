"""A port is taken before anything slow begins."""

import socket

import pytest

from anabranch.serve.http.listen import bind, url
from anabranch.serve.http.settings import ServerSettings


def settings(**changes):
    return ServerSettings(**{"port": 0, "model_names": ("m",), **changes})


def test_clients_are_refused_until_somebody_listens():
    with bind(settings()) as listener:
        address = listener.getsockname()
        assert url(listener) == f"http://127.0.0.1:{address[1]}"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        listener.listen()
        socket.create_connection(address).close()


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            bind(settings(port=port))


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_ipv6_addresses_are_written_as_in_urls():
    with bind(settings(host="::1")) as listener:
        assert url(listener).startswith("http://[::1]:")
