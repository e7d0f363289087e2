//! What holds for any datagram whatsoever, in each of the three modes. Shared with the fuzz target.

use std::net::SocketAddr;

use mmproxyctl::model::UdpHeader;
use mmproxyctl::relay::header::{self, Decoded, Endpoints, HeaderError, Version};
use mmproxyctl::relay::spp::{self, Spp};
use mmproxyctl::relay::udp::datagram::{Client, Datagram, DatagramError, read};

/// What begins every v2 header.
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// All laws at once. Panics when one is broken.
pub(crate) fn assert_all(bytes: &[u8]) {
    let every = read(UdpHeader::Every, bytes);
    assert_every(bytes, every);
    assert_first(bytes, every);
    assert_spp(bytes);
}

/// A header on every datagram: exactly the v2 headers that the stream decoder takes, whole.
fn assert_every(bytes: &[u8], outcome: Result<Datagram, DatagramError>) {
    let shown = bytes.escape_ascii();
    match (outcome, header::decode(bytes)) {
        (Ok(Datagram::Headed { client, payload }), Ok(Decoded::Complete { header, length })) => {
            assert_eq!(header.version, Version::V2, "{shown}");
            assert_eq!(payload, length, "{shown}");
            match (client, header.endpoints) {
                (
                    Client::Named {
                        client: named,
                        asked,
                    },
                    Endpoints::Proxied {
                        client,
                        destination,
                    },
                ) => assert_eq!((named, asked), (client, destination), "{shown}"),
                (Client::Proxy, Endpoints::Local) => {}
                (client, endpoints) => panic!("{shown}: {client:?} of {endpoints:?}"),
            }
            assert_payload_is_free(UdpHeader::Every, bytes, payload);
        }
        (Err(DatagramError::Empty), _) => assert!(bytes.is_empty()),
        (Err(DatagramError::Version1), Ok(Decoded::Complete { header, .. })) => {
            assert_eq!(header.version, Version::V1, "{shown}");
        }
        (Err(DatagramError::Version1), _) => assert!(bytes.starts_with(b"PROXY "), "{shown}"),
        (Err(DatagramError::Truncated), Ok(Decoded::Incomplete)) => {}
        (Err(DatagramError::Simple), Err(HeaderError::NotProxy)) => {
            assert!(Spp::decode(bytes).is_ok(), "{shown}");
        }
        (Err(DatagramError::Header(of_datagram)), Err(of_stream)) => {
            assert_eq!(of_datagram, of_stream, "{shown}");
        }
        (outcome, of_stream) => panic!("{shown}: {outcome:?}, of a stream {of_stream:?}"),
    }
}

/// A header on the first datagram only: what begins with the signature is read as with a header on every one,
/// all else is payload from its first byte, except a whole v1 header.
fn assert_first(bytes: &[u8], every: Result<Datagram, DatagramError>) {
    let shown = bytes.escape_ascii();
    let first = read(UdpHeader::First, bytes);
    if bytes.is_empty() || bytes.starts_with(SIGNATURE) {
        assert_eq!(first, every, "{shown}");
        return;
    }
    let is_version1 = matches!(header::decode(bytes), Ok(Decoded::Complete { .. }));
    let expected = match is_version1 {
        true => Err(DatagramError::Version1),
        false => Ok(Datagram::Bare),
    };
    assert_eq!(first, expected, "{shown}");
}

/// Simple Proxy Protocol: the magic and 38 bytes, which an answer repeats as they came.
fn assert_spp(bytes: &[u8]) {
    let shown = bytes.escape_ascii();
    let outcome = read(UdpHeader::Spp, bytes);
    let whole = bytes.len() >= spp::LENGTH && bytes.starts_with(&spp::MAGIC);
    let Ok(Datagram::Headed {
        client: Client::Spp(header),
        payload,
    }) = outcome
    else {
        assert!(outcome.is_err() && !whole, "{shown}: {outcome:?}");
        return;
    };
    assert!(whole && payload == spp::LENGTH, "{shown}");
    assert_eq!(header.bytes()[..], bytes[..spp::LENGTH], "{shown}");
    // what was understood, written anew, is the same header
    let client: SocketAddr = header.client().get();
    assert_eq!(Spp::new(client, header.proxy()), header, "{shown}");
    assert_payload_is_free(UdpHeader::Spp, bytes, payload);
}

/// What stands behind a header means nothing to the decoder, and a header that is cut is none.
fn assert_payload_is_free(mode: UdpHeader, bytes: &[u8], payload: usize) {
    let whole = read(mode, bytes);
    for cut in 0..payload {
        let part = read(mode, &bytes[..cut]);
        assert!(part.is_err(), "{part:?} of {cut} bytes");
    }
    assert_eq!(read(mode, &bytes[..payload]), whole);
    let inverted: Vec<u8> = bytes[payload..].iter().map(|byte| !byte).collect();
    assert_eq!(read(mode, &[&bytes[..payload], &inverted].concat()), whole);
}
