"""An HTTP/3 server: answers who is asking, or as many bytes as the path says.

server.py CERTIFICATE-AND-KEY ADDRESS...: serves UDP port 443 of each address; writes the certificate first.
"""

import asyncio
import datetime
import sys

from aioquic.asyncio import QuicConnectionProtocol, serve
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Server(QuicConnectionProtocol):
    http = None

    def connection_made(self, transport):
        super().connection_made(transport)
        self.peer = None

    def datagram_received(self, data, addr):
        # of the connection: with a new client address the next line says so
        self.peer = addr
        super().datagram_received(data, addr)

    def quic_event_received(self, event):
        if self.http is None:
            self.http = H3Connection(self._quic)
        for h3 in self.http.handle_event(event):
            if isinstance(h3, HeadersReceived):
                self.answer(h3.stream_id, dict(h3.headers)[b":path"].decode())

    def answer(self, stream, path):
        host, port = self.peer[:2]
        print(f"{path} from {host} port {port}", flush=True)
        number = path.lstrip("/")
        body = bytes(int(number)) if number.isdigit() else f"{host} {port}".encode()
        self.http.send_headers(stream, [(b":status", b"200")])
        self.http.send_data(stream, body, end_stream=True)
        self.transmit()


def write_certificate(path):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "wks01.test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("wks01.test")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    with open(path, "wb") as file:
        file.write(certificate.public_bytes(serialization.Encoding.PEM))
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )


async def main(certificate, addresses):
    write_certificate(certificate)
    configuration = QuicConfiguration(is_client=False, alpn_protocols=H3_ALPN)
    configuration.load_cert_chain(certificate, certificate)
    for address in addresses:
        await serve(address, 443, configuration=configuration, create_protocol=Server)
    print("serving", flush=True)
    await asyncio.Future()


asyncio.run(main(sys.argv[1], sys.argv[2:]))
