"""Attacks that want to talk to somebody: this host, Ray's ports, other hosts, other processes."""

from functools import partial

from tests.tools.attacks.attack import attack

network = partial(attack, "network")

NETWORK = (
    network(
        "tcp to a port of this host",
        """
        for host in ("127.0.0.1", "127.0.0.2", "0.0.0.0", "localhost", W["host_name"]):
            attempt(f"connect to {host}", lambda: socket.create_connection((host, W["tcp"]), 0.1))
        """,
        imports="socket",
    ),
    network(
        "tcp over IPv6",
        """
        for host in ("::1", "::", "::ffff:127.0.0.1"):
            for port in (W["tcp"], W.get("tcp6", 1)):
                attempt(f"connect to [{host}]:{port}", lambda: socket.create_connection((host, port), 0.1))
        """,
        imports="socket",
    ),
    network(
        "udp to this host",
        """
        def send():
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                return sender.sendto(b"out", ("127.0.0.1", W["udp"]))
        attempt("sendto", send)
        """,
        imports="socket",
    ),
    network(
        "tcp by raw system calls",
        """
        address = W["tcp"].to_bytes(2, "big") + bytes([127, 0, 0, 1]) + bytes(8)
        address = (2).to_bytes(2, sys.byteorder) + address
        for flags in (0, 0o4000, 0o2000000, 1 << 32):
            def connect():
                descriptor = system("socket", 2, 1 | flags, 0)
                return system("connect", descriptor, address, 16)
            attempt(f"socket with flags {flags:#x}", connect)
        """,
    ),
    network(
        "a listening socket",
        """
        def listen(family, address):
            listener = socket.socket(family)
            listener.bind(address)
            listener.listen()
            return listener
        attempt("listen on IPv4", lambda: listen(socket.AF_INET, ("0.0.0.0", 0)))
        attempt("listen on IPv6", lambda: listen(socket.AF_INET6, ("::", 0)))
        attempt("listen on an abstract name", lambda: listen(socket.AF_UNIX, "\\0" + W["token"]))
        attempt("listen on a path", lambda: listen(socket.AF_UNIX, "listen.sock"))
        """,
        imports="socket",
    ),
    network(
        "unix sockets with a path",
        """
        def connect(kind, path):
            client = socket.socket(socket.AF_UNIX, kind)
            client.connect(path)
            client.send(b"out")
        attempt("connect a stream", lambda: connect(socket.SOCK_STREAM, W["unix"]))
        attempt("connect datagrams", lambda: connect(socket.SOCK_DGRAM, W["unix_datagram"]))
        def through_a_link():
            os.symlink(W["unix"], "link.sock")
            connect(socket.SOCK_STREAM, "link.sock")
        attempt("connect through a link", through_a_link)
        """,
        imports="socket",
    ),
    network(
        "unix sockets with an abstract name",
        """
        def connect(kind, name):
            client = socket.socket(socket.AF_UNIX, kind)
            client.connect(name)
            client.send(b"out")
        attempt("connect a stream", lambda: connect(socket.SOCK_STREAM, W["abstract"]))
        attempt("connect datagrams", lambda: connect(socket.SOCK_DGRAM, W["abstract_datagram"]))
        """,
        imports="socket",
    ),
    network(
        "a socket pair that is turned elsewhere",
        """
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
            for name in ("abstract_datagram", "unix_datagram", "abstract", "unix"):
                def fresh():
                    return socket.socketpair(socket.AF_UNIX, kind)[0]
                attempt(f"connect to {name}", lambda: fresh().connect(W[name]))
                if kind == socket.SOCK_DGRAM:
                    attempt(f"sendto {name}", lambda: fresh().sendto(b"out", W[name]))
                    attempt(f"sendmsg to {name}", lambda: fresh().sendmsg([b"out"], [], 0, W[name]))
        """,
        imports="socket",
    ),
    network(
        "sockets of every family",
        """
        for family in [*range(0, 48), 1 << 32 | 2]:
            for kind in (1, 2, 3, 5):
                try:
                    system("socket", family, kind, 0)
                except OSError as error:
                    last = error
                else:
                    print(f"SUCCEEDED a socket of family {family:#x} and kind {kind}")
        print(f"denied the rest: {last}")
        attempt("AF_NETLINK", lambda: system("socket", 16, 3, 0))
        attempt("AF_PACKET", lambda: system("socket", 17, 3, 0x300))
        attempt("AF_ALG", lambda: system("socket", 38, 5, 0))
        attempt("AF_VSOCK", lambda: system("socket", 40, 1, 0))
        """,
    ),
    network(
        "socket pairs of other families",
        """
        pair = (ctypes.c_int * 2)()
        for family in (2, 10, 16, 30, 1 << 32 | 30):
            for kind in (1, 2, 5):
                attempt(f"socketpair of family {family:#x}", lambda: system("socketpair", family, kind, 0, pair))
        """,
    ),
    network(
        "names",
        """
        def connect():
            address = socket.getaddrinfo("localhost", W["tcp"], type=socket.SOCK_STREAM)[0][4]
            return socket.create_connection(address, 0.1)
        attempt("connect by name", connect)
        attempt("resolve", lambda: socket.gethostbyname("rlsys.invalid"))
        """,
        imports="socket",
    ),
    network(
        "the libraries that a model would use",
        """
        url = f"http://127.0.0.1:{W['tcp']}/api/jobs/"
        attempt("urllib", lambda: urllib.request.urlopen(url, timeout=0.1))
        attempt("http.client", lambda: http.client.HTTPConnection("127.0.0.1", W["tcp"]).request("GET", "/"))
        """,
        imports="urllib.request http.client",
    ),
    network(
        "descriptors that were inherited",
        """
        found = []
        for descriptor in range(3, 1024):
            try:
                found.append((descriptor, os.readlink(f"/proc/self/fd/{descriptor}")))
            except OSError:
                pass
            for name in ("abstract_datagram", "unix_datagram", "abstract", "unix"):
                try:
                    channel = socket.socket(fileno=os.dup(descriptor))
                except Exception:
                    break
                with channel:
                    for send in (lambda: channel.sendmsg([b""], [], 0, W[name]), lambda: channel.connect(W[name])):
                        try:
                            send()
                        except OSError:
                            continue
                        print(f"SUCCEEDED to send from descriptor {descriptor} to {name}")
        print(f"harmless descriptors: {found}")
        """,
        imports="socket",
    ),
    network(
        "descriptors that wait in a socket",
        """
        stolen = []
        for descriptor in range(3, 1024):
            try:
                with socket.socket(fileno=os.dup(descriptor)) as channel:
                    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
                    stolen += channel.recvmsg(0, socket.CMSG_SPACE(256), flags)[1]
            except Exception:
                continue
        attempt("recvmsg on every descriptor", lambda: stolen, bad=bool)
        """,
        imports="socket",
    ),
)
