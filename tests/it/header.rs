//! The PROXY header decoder and encoder: laws that hold for any bytes, the table of malformed headers,
//! and agreement with two other decoders.

mod differential;
pub(crate) mod generate;
pub(crate) mod laws;

use std::collections::HashSet;
use std::net::SocketAddr;

use mmproxyctl::relay::header::{
    Decoded, EncodeError, Endpoints, Header, MAX_V2, Transport, V2, decode, encode_v1, encode_v2,
    tlv,
};
use proptest::prelude::*;

use crate::support::malformed;

/// More cases than proptest's own default, since one takes microseconds; `PROPTEST_CASES` for more.
fn many() -> ProptestConfig {
    let default = ProptestConfig::default();
    ProptestConfig {
        cases: default.cases.max(4096),
        failure_persistence: None,
        ..default
    }
}

fn complete(bytes: &[u8]) -> (Header<'_>, usize) {
    match decode(bytes) {
        Ok(Decoded::Complete { header, length }) => (header, length),
        other => panic!("{}: {other:?}", bytes.escape_ascii()),
    }
}

fn ends(endpoints: Endpoints) -> Option<(SocketAddr, SocketAddr)> {
    match endpoints {
        Endpoints::Proxied {
            client,
            destination,
        } => Some((client.get(), destination)),
        Endpoints::Local => None,
    }
}

fn unmapped(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

#[test]
fn malformed_headers_are_refused() {
    let table = malformed::all();
    assert!(table.len() >= 60, "{} entries", table.len());
    let names: HashSet<_> = table.iter().map(|entry| entry.name).collect();
    assert_eq!(names.len(), table.len(), "names are unique");
    for entry in table {
        let outcome = decode(&entry.bytes);
        let Err(error) = outcome else {
            panic!("{}: {outcome:?}", entry.name);
        };
        assert!(
            error.to_string().contains(entry.error),
            "{}: '{error}', expected '{}'",
            entry.name,
            entry.error
        );
        laws::assert_all(&entry.bytes);
    }
}

#[test]
fn what_is_no_header_fails_on_the_first_byte() {
    for byte in (0..=u8::MAX).filter(|byte| !b"P\r".contains(byte)) {
        assert!(decode(&[byte]).is_err(), "{byte:#x}");
    }
    assert_eq!(decode(b""), Ok(Decoded::Incomplete));
}

/// Where exactly a header is refused: with one byte less it is still one that may become good.
#[test]
fn refused_with_the_first_wrong_byte() {
    let refused: [&[u8]; 14] = [
        b"PRI",
        b"PROXYx",
        b"PROXY TCP5",
        b"PROXY UNKNOWNS",
        b"PROXY TCP4 256",
        b"PROXY TCP4 01",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 65536",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\n",
        b"PROXY TCP6 :::",
        b"PROXY TCP6 1::2::",
        b"PROXY TCP6 12345",
        b"\r\n\r\n\0\r\nQUIT\n\x11",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x41",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0b",
    ];
    for bytes in refused {
        let (_, before) = bytes.split_last().unwrap();
        assert_eq!(
            decode(before),
            Ok(Decoded::Incomplete),
            "{}",
            before.escape_ascii()
        );
        assert!(decode(bytes).is_err(), "{}", bytes.escape_ascii());
    }
}

#[test]
fn longest_headers_are_taken() {
    let group = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
    let line = format!("PROXY UNKNOWN {group} {group} 65535 65535\r\n");
    assert_eq!(line.len(), 107);
    assert_eq!(complete(line.as_bytes()).1, 107);

    let ends: (SocketAddr, SocketAddr) = ("[::1]:1".parse().unwrap(), "[::2]:2".parse().unwrap());
    let longest = V2::proxied(ends.0, ends.1, Transport::Stream)
        .tlv(0xee, &vec![7; MAX_V2 - 16 - 36 - 3])
        .unwrap()
        .finish();
    assert_eq!(complete(&longest).1, MAX_V2);
    laws::assert_all(&longest);
}

#[test]
fn encoder_keeps_to_the_format() {
    let (v4, v6): (SocketAddr, SocketAddr) = (
        "192.0.2.1:1".parse().unwrap(),
        "[2001:db8::1]:2".parse().unwrap(),
    );
    assert_eq!(encode_v1(v4, v4), b"PROXY TCP4 192.0.2.1 192.0.2.1 1 1\r\n");
    assert_eq!(
        encode_v1(v4, v6),
        b"PROXY TCP6 ::ffff:192.0.2.1 2001:db8::1 1 2\r\n"
    );
    assert_eq!(
        encode_v2(v4, v4),
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\xc0\x00\x02\x01\xc0\x00\x02\x01\x00\x01\x00\x01"
    );
    assert_eq!(encode_v2(v6, v4)[13..16], [0x21, 0, 36]);
    assert_eq!(V2::local().finish()[12..], [0x20, 0, 0, 0]);
    assert_eq!(V2::unspec().finish()[12..], [0x21, 0, 0, 0]);

    let too_long = vec![0; 65536];
    assert_eq!(
        V2::local().tlv(tlv::NOOP, &too_long).err(),
        Some(EncodeError)
    );
    let full = V2::local().tlv(tlv::NOOP, &too_long[..65532]).unwrap();
    assert_eq!(full.clone().finish()[14..16], [0xff, 0xff]);
    assert_eq!(full.finish_with_crc32c(), Err(EncodeError));
}

/// The checksum of RFC 3720, appendix B.4, so that both our CRC32C are the one meant.
#[test]
fn the_checksum_is_crc32c() {
    assert_eq!(laws::crc32c(&[0; 32]), 0x8a91_36aa);
    assert_eq!(laws::crc32c(b"123456789"), 0xe306_9283);
}

proptest! {
    #![proptest_config(many())]

    #[test]
    fn round_trip(sample in generate::header(), behind in proptest::collection::vec(any::<u8>(), 0..40)) {
        let bytes = [&sample.bytes[..], &behind].concat();
        let (header, length) = complete(&bytes);
        prop_assert_eq!(length, sample.bytes.len());
        let expected = sample.ends.map(|(client, destination)| (unmapped(client), unmapped(destination)));
        prop_assert_eq!(ends(header.endpoints), expected);
        prop_assert_eq!(header.transport, sample.transport);
        let mut tlvs: Vec<_> = header.tlvs.iter().map(|(kind, value)| (kind, value.to_vec())).collect();
        if sample.checksum {
            prop_assert_eq!(tlvs.pop().map(|(kind, _)| kind), Some(tlv::CRC32C));
        }
        prop_assert_eq!(tlvs, sample.tlvs);
    }

    #[test]
    fn laws_hold_for_valid_headers(sample in generate::header()) {
        laws::assert_all(&sample.bytes);
    }

    #[test]
    fn laws_hold_for_damaged_headers(bytes in generate::damaged()) {
        laws::assert_all(&bytes);
    }

    #[test]
    fn laws_hold_for_noise(bytes in generate::noise()) {
        laws::assert_all(&bytes);
    }

    /// A changed byte gets past a checksum only where it hides the checksum itself: by making the header
    /// LOCAL or UNSPEC, whose block is skipped, or by moving the TLVs.
    #[test]
    fn a_changed_byte_fails_the_checksum(
        sample in generate::checksummed(),
        at in any::<proptest::sample::Index>(),
        change in 1..=u8::MAX,
    ) {
        let mut bytes = sample.bytes;
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        if let Ok(Decoded::Complete { header, .. }) = decode(&bytes) {
            prop_assert!(at >= 12, "a changed signature");
            prop_assert_eq!(header.tlvs.get(tlv::CRC32C), None);
            if sample.tlvs.is_empty() {
                // nothing but the addressing, the lengths and the type of the checksum can hide it
                let value = bytes.len() - 4..bytes.len();
                let block = 16..bytes.len() - 7;
                prop_assert!(!value.contains(&at) && !block.contains(&at), "byte {}", at);
            }
        }
    }
}
