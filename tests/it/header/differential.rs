//! Agreement with two other decoders, `ppp` and `proxy-header`, on valid and on damaged headers.
//!
//! A verdict is: a header of this length with these ends, or no header. Whether "no" means "not yet" is
//! not compared: the others find out at the end of the line what is refused here byte by byte. Where
//! they are known to disagree is listed with the reason; any other disagreement fails.

use std::net::SocketAddr;

use mmproxyctl::relay::header::{Decoded, Endpoints, HeaderError, MAX_V2, decode, tlv};
use proptest::prelude::*;

use super::generate::{self, v2};

type Ours<'a> = Result<Decoded<'a>, HeaderError>;

/// What a decoder makes of bytes; none means that it sees no whole, valid header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Verdict {
    length: usize,
    ends: Option<(SocketAddr, SocketAddr)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peer {
    Ppp,
    ProxyHeader,
}

impl Peer {
    fn decode(self, bytes: &[u8]) -> Option<Verdict> {
        match self {
            Self::Ppp => by_ppp(bytes),
            Self::ProxyHeader => by_proxy_header(bytes),
        }
    }
}

fn ends(client: SocketAddr, destination: SocketAddr) -> Option<(SocketAddr, SocketAddr)> {
    let unmapped = |addr: SocketAddr| SocketAddr::new(addr.ip().to_canonical(), addr.port());
    Some((unmapped(client), unmapped(destination)))
}

fn by_us(ours: Ours<'_>) -> Option<Verdict> {
    let Ok(Decoded::Complete { header, length }) = ours else {
        return None;
    };
    let ends = match header.endpoints {
        Endpoints::Proxied {
            client,
            destination,
        } => Some((client.get(), destination)),
        Endpoints::Local => None,
    };
    Some(Verdict { length, ends })
}

fn by_ppp(bytes: &[u8]) -> Option<Verdict> {
    use ppp::{HeaderResult, v1, v2};
    match HeaderResult::parse(bytes) {
        HeaderResult::V1(Ok(header)) => Some(Verdict {
            length: header.header.len(),
            ends: match header.addresses {
                v1::Addresses::Unknown => None,
                v1::Addresses::Tcp4(a) => ends(
                    (a.source_address, a.source_port).into(),
                    (a.destination_address, a.destination_port).into(),
                ),
                v1::Addresses::Tcp6(a) => ends(
                    (a.source_address, a.source_port).into(),
                    (a.destination_address, a.destination_port).into(),
                ),
            },
        }),
        HeaderResult::V2(Ok(header)) => Some(Verdict {
            length: header.len(),
            ends: match (header.command, header.addresses) {
                (v2::Command::Proxy, v2::Addresses::IPv4(a)) => ends(
                    (a.source_address, a.source_port).into(),
                    (a.destination_address, a.destination_port).into(),
                ),
                (v2::Command::Proxy, v2::Addresses::IPv6(a)) => ends(
                    (a.source_address, a.source_port).into(),
                    (a.destination_address, a.destination_port).into(),
                ),
                _ => None,
            },
        }),
        _ => None,
    }
}

fn by_proxy_header(bytes: &[u8]) -> Option<Verdict> {
    let config = proxy_header::ParseConfig::default();
    let (header, length) = proxy_header::ProxyHeader::parse(bytes, config).ok()?;
    Some(Verdict {
        length,
        ends: header
            .proxied_address()
            .and_then(|addresses| ends(addresses.source, addresses.destination)),
    })
}

/// A known difference, and bytes that show it.
struct Disagreement {
    peer: Peer,
    reason: &'static str,
    covers: fn(&[u8], Ours<'_>, Option<Verdict>) -> bool,
    example: fn() -> Vec<u8>,
}

fn is_local(bytes: &[u8], ours: Ours<'_>) -> bool {
    ours.is_ok() && bytes.get(12) == Some(&0x20)
}

fn is_unknown(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PROXY UNKNOWN")
}

fn in_tlvs(ours: Ours<'_>) -> bool {
    matches!(
        ours,
        Err(HeaderError::TlvTruncated
            | HeaderError::ChecksumLength(_)
            | HeaderError::ChecksumTwice
            | HeaderError::ChecksumMismatch { .. }
            | HeaderError::UniqueIdLength(_))
    )
}

fn with_tlv(tlv: &[u8]) -> Vec<u8> {
    v2(0x21, 0x11, &[&[0; 12], tlv].concat())
}

const KNOWN: &[Disagreement] = &[
    Disagreement {
        peer: Peer::Ppp,
        reason: "reads ports with str::parse, which takes a plus",
        covers: |bytes, ours, theirs| {
            matches!(ours, Err(HeaderError::V1Port(_)))
                && theirs.is_some()
                && bytes.windows(2).any(|pair| pair == b" +")
        },
        example: || b"PROXY TCP4 192.0.2.1 192.0.2.2 +80 2\r\n".to_vec(),
    },
    Disagreement {
        peer: Peer::Ppp,
        reason: "looks at TLVs only when asked and never verifies a checksum",
        covers: |_, ours, theirs| in_tlvs(ours) && theirs.is_some(),
        example: || with_tlv(&[tlv::CRC32C, 0, 4, 0, 0, 0, 0]),
    },
    Disagreement {
        peer: Peer::Ppp,
        reason: "takes v2 headers of up to 64 kB",
        covers: |_, ours, theirs| {
            matches!(ours, Err(HeaderError::V2TooLong(_))) && theirs.is_some()
        },
        example: || v2(0x21, 0x00, &[0; MAX_V2]),
    },
    Disagreement {
        peer: Peer::Ppp,
        reason: "refuses LOCAL for what its family, transport or length says, which is to be ignored",
        covers: |bytes, ours, theirs| is_local(bytes, ours) && theirs.is_none(),
        example: || v2(0x20, 0xff, b"ignored"),
    },
    Disagreement {
        peer: Peer::Ppp,
        reason: "takes the addresses of transport UNSPEC, which are to be ignored",
        covers: |bytes, ours, theirs| {
            let ours = by_us(ours);
            matches!(bytes.get(13), Some(0x10 | 0x20))
                && ours.is_some_and(|ours| ours.ends.is_none())
                && ours.map(|ours| ours.length) == theirs.map(|theirs| theirs.length)
        },
        example: || v2(0x21, 0x10, &[1; 12]),
    },
    Disagreement {
        peer: Peer::Ppp,
        reason: "wants UTF-8 and at most five words behind UNKNOWN, and no CR among them",
        covers: |bytes, ours, theirs| is_unknown(bytes) && ours.is_ok() && theirs.is_none(),
        example: || b"PROXY UNKNOWN a b c d e f\r\n".to_vec(),
    },
    Disagreement {
        peer: Peer::Ppp,
        reason: "takes LF behind a space for the end of the line",
        covers: |bytes, ours, theirs| {
            !matches!(ours, Ok(Decoded::Complete { length, .. }) if Some(length) == theirs.map(|theirs| theirs.length))
                && theirs.is_some_and(|theirs| !bytes[..theirs.length].ends_with(b"\r\n"))
        },
        example: || b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 \n".to_vec(),
    },
    Disagreement {
        peer: Peer::ProxyHeader,
        reason: "does not look at the byte behind PROXY",
        covers: |bytes, ours, theirs| {
            ours == Err(HeaderError::NotProxy) && theirs.is_some() && bytes.starts_with(b"PROXY")
        },
        example: || b"PROXYxTCP4 192.0.2.1 192.0.2.2 1 2\r\n".to_vec(),
    },
    Disagreement {
        peer: Peer::ProxyHeader,
        reason: "limits only lines that have not ended yet",
        covers: |_, ours, theirs| ours == Err(HeaderError::V1TooLong) && theirs.is_some(),
        example: || [b"PROXY UNKNOWN ", &[b'x'; 300][..], b"\r\n"].concat(),
    },
    Disagreement {
        peer: Peer::ProxyHeader,
        reason: "takes any word that begins with UNKNOWN",
        covers: |bytes, ours, theirs| {
            matches!(ours, Err(HeaderError::V1Protocol)) && theirs.is_some() && is_unknown(bytes)
        },
        example: || b"PROXY UNKNOWNS\r\n".to_vec(),
    },
    Disagreement {
        peer: Peer::ProxyHeader,
        reason: "reads ports with str::parse, which takes a plus and leading zeros",
        covers: |_, ours, theirs| matches!(ours, Err(HeaderError::V1Port(_))) && theirs.is_some(),
        example: || b"PROXY TCP4 192.0.2.1 192.0.2.2 080 2\r\n".to_vec(),
    },
    Disagreement {
        peer: Peer::ProxyHeader,
        reason: "ends an UNKNOWN line at its first CR, and wants an LF there",
        covers: |bytes, ours, theirs| is_unknown(bytes) && ours.is_ok() && theirs.is_none(),
        example: || b"PROXY UNKNOWN a\rb\r\n".to_vec(),
    },
    Disagreement {
        peer: Peer::ProxyHeader,
        reason: "looks at TLVs only when asked and never verifies a checksum",
        covers: |_, ours, theirs| in_tlvs(ours) && theirs.is_some(),
        example: || with_tlv(&[tlv::NOOP, 0, 1]),
    },
    Disagreement {
        peer: Peer::ProxyHeader,
        reason: "takes v2 headers of up to 64 kB",
        covers: |_, ours, theirs| {
            matches!(ours, Err(HeaderError::V2TooLong(_))) && theirs.is_some()
        },
        example: || v2(0x21, 0x00, &[0; MAX_V2]),
    },
    Disagreement {
        peer: Peer::ProxyHeader,
        reason: "refuses LOCAL for what its family, transport or length says, which is to be ignored",
        covers: |bytes, ours, theirs| is_local(bytes, ours) && theirs.is_none(),
        example: || v2(0x20, 0x11, b"ignored"),
    },
    Disagreement {
        peer: Peer::ProxyHeader,
        reason: "refuses UNSPEC in one half of the addressing byte",
        covers: |bytes, ours, theirs| {
            matches!(bytes.get(13), Some(0x01 | 0x02 | 0x10 | 0x20 | 0x30))
                && ours.is_ok()
                && theirs.is_none()
        },
        example: || v2(0x21, 0x10, &[1; 12]),
    },
];

fn assert_agreement(bytes: &[u8]) -> Result<(), TestCaseError> {
    let ours = decode(bytes);
    for peer in [Peer::Ppp, Peer::ProxyHeader] {
        let theirs = peer.decode(bytes);
        let known = || {
            KNOWN
                .iter()
                .any(|known| known.peer == peer && (known.covers)(bytes, ours, theirs))
        };
        prop_assert!(
            by_us(ours) == theirs || known(),
            "{}\n  {peer:?}: {theirs:?}\n  we: {ours:?}",
            bytes.escape_ascii()
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(super::many())]

    #[test]
    fn agreement_on_valid_headers(sample in generate::header()) {
        assert_agreement(&sample.bytes)?;
    }

    #[test]
    fn agreement_on_damaged_headers(bytes in generate::damaged()) {
        assert_agreement(&bytes)?;
    }

    #[test]
    fn agreement_on_noise(bytes in generate::noise()) {
        assert_agreement(&bytes)?;
    }
}

#[test]
fn known_disagreements_are_still_there() {
    for known in KNOWN {
        let bytes = (known.example)();
        let (ours, theirs) = (decode(&bytes), known.peer.decode(&bytes));
        assert_ne!(by_us(ours), theirs, "{:?} {}", known.peer, known.reason);
        assert!(
            (known.covers)(&bytes, ours, theirs),
            "{:?} {}: {ours:?}, {theirs:?}",
            known.peer,
            known.reason
        );
    }
}
