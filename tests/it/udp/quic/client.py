"""An HTTP/3 client: client.py CERTIFICATE ADDRESS PORT PATH... fetches each path over one connection.

Prints "LENGTH BODY" of each answer, the body only where it is short.
"""

import asyncio
import sys

from aioquic.asyncio import QuicConnectionProtocol, connect
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration


class Client(QuicConnectionProtocol):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.http = H3Connection(self._quic)
        self.waiting = {}

    async def fetch(self, path):
        stream = self._quic.get_next_available_stream_id()
        headers = [
            (b":method", b"GET"),
            (b":scheme", b"https"),
            (b":authority", b"wks01.test"),
            (b":path", path.encode()),
        ]
        self.http.send_headers(stream, headers, end_stream=True)
        self.waiting[stream] = (bytearray(), asyncio.get_running_loop().create_future())
        self.transmit()
        return await asyncio.wait_for(self.waiting[stream][1], 20)

    def quic_event_received(self, event):
        for h3 in self.http.handle_event(event):
            if isinstance(h3, (DataReceived, HeadersReceived)) and h3.stream_id in self.waiting:
                body, done = self.waiting[h3.stream_id]
                if isinstance(h3, DataReceived):
                    body += h3.data
                if h3.stream_ended and not done.done():
                    done.set_result(bytes(body))


async def main(certificate, address, port, paths):
    configuration = QuicConfiguration(
        is_client=True, alpn_protocols=H3_ALPN, server_name="wks01.test"
    )
    configuration.load_verify_locations(certificate)
    async with connect(
        address, int(port), configuration=configuration, create_protocol=Client
    ) as client:
        for path in paths:
            body = await client.fetch(path)
            print(len(body), body.decode() if len(body) < 100 else "")


asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]))
