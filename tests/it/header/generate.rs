//! Headers as senders write them, and as they get damaged.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use mmproxyctl::relay::header::{Transport, V1_UNKNOWN, V2, encode_v1, tlv};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

/// A valid header and what it says.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    pub(crate) bytes: Vec<u8>,
    /// Client and destination, none for the proxy's own.
    pub(crate) ends: Option<(SocketAddr, SocketAddr)>,
    pub(crate) transport: Transport,
    pub(crate) tlvs: Vec<(u8, Vec<u8>)>,
    /// Whether a CRC32C stands at its end.
    pub(crate) checksum: bool,
}

impl Sample {
    fn local(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            ends: None,
            transport: Transport::Unspecified,
            tlvs: Vec::new(),
            checksum: false,
        }
    }
}

/// Any valid header.
pub(crate) fn header() -> impl Strategy<Value = Sample> {
    prop_oneof![
        3 => v1_line(),
        1 => v1_unknown(),
        4 => any::<bool>().prop_flat_map(v2_proxied),
        1 => v2_unix(),
        1 => v2_discarded(),
    ]
}

fn ipv6() -> impl Strategy<Value = Ipv6Addr> {
    // groups of zero are what the short forms are about
    let group = prop_oneof![2 => Just(0u16), 1 => any::<u16>(), 1 => 0..16u16];
    prop_oneof![
        4 => proptest::array::uniform8(group).prop_map(Ipv6Addr::from),
        1 => any::<Ipv4Addr>().prop_map(|addr| addr.to_ipv6_mapped()),
    ]
}

fn ends() -> impl Strategy<Value = (SocketAddr, SocketAddr)> {
    let pair = prop_oneof![
        any::<[Ipv4Addr; 2]>().prop_map(|pair| pair.map(IpAddr::V4)),
        [ipv6(), ipv6()].prop_map(|pair| pair.map(IpAddr::V6)),
    ];
    (pair, any::<[u16; 2]>()).prop_map(|([client, destination], ports)| {
        (
            SocketAddr::new(client, ports[0]),
            SocketAddr::new(destination, ports[1]),
        )
    })
}

/// The forms an IPv6 address may be written in.
fn written(addr: IpAddr, form: u8) -> String {
    let IpAddr::V6(addr) = addr else {
        return addr.to_string();
    };
    let groups = addr.segments();
    let joined = |groups: &[u16], digits: fn(&u16) -> String| {
        groups.iter().map(digits).collect::<Vec<_>>().join(":")
    };
    match form % 5 {
        0 => addr.to_string(),
        1 => addr.to_string().to_uppercase(),
        2 => joined(&groups, |group| format!("{group:x}")),
        3 => joined(&groups, |group| format!("{group:04X}")),
        _ => {
            let [.., a, b, c, d] = addr.octets();
            // the dotted end, short enough for two of them on a line
            format!(
                "{}:{a}.{b}.{c}.{d}",
                joined(&groups[..6], |group| format!("{group:x}"))
            )
        }
    }
}

fn v1_line() -> impl Strategy<Value = Sample> {
    (ends(), any::<[u8; 2]>()).prop_map(|((client, destination), forms)| {
        let line = format!(
            "PROXY {} {} {} {} {}\r\n",
            if client.is_ipv4() { "TCP4" } else { "TCP6" },
            written(client.ip(), forms[0]),
            written(destination.ip(), forms[1]),
            client.port(),
            destination.port()
        );
        let bytes = if line.len() > 107 {
            encode_v1(client, destination)
        } else {
            line.into_bytes()
        };
        Sample {
            bytes,
            ends: Some((client, destination)),
            transport: Transport::Stream,
            tlvs: Vec::new(),
            checksum: false,
        }
    })
}

fn v1_unknown() -> impl Strategy<Value = Sample> {
    let rest = prop_oneof![
        vec(any::<u8>(), 0..92),
        "[0-9a-f:. ]{0,91}".prop_map(String::into_bytes),
    ];
    prop_oneof![
        1 => Just(V1_UNKNOWN.to_vec()),
        3 => rest.prop_map(|mut rest| {
            // a CRLF inside would end the line earlier
            rest.retain(|byte| *byte != b'\r');
            rest.truncate(107 - 16);
            [b"PROXY UNKNOWN ", &rest[..], b"\r\n"].concat()
        }),
    ]
    .prop_map(Sample::local)
}

fn tlvs() -> impl Strategy<Value = Vec<(u8, Vec<u8>)>> {
    let kind = prop_oneof![
        3 => select(&[tlv::ALPN, tlv::AUTHORITY, tlv::NOOP, tlv::UNIQUE_ID, tlv::SSL, tlv::NETNS][..]),
        1 => any::<u8>().prop_filter("that one is computed", |kind| *kind != tlv::CRC32C),
    ];
    vec((kind, vec(any::<u8>(), 0..=tlv::MAX_UNIQUE_ID)), 0..5)
}

/// A v2 header that ends with a CRC32C.
pub(crate) fn checksummed() -> impl Strategy<Value = Sample> {
    v2_proxied(true)
}

fn v2_proxied(checksum: bool) -> impl Strategy<Value = Sample> {
    let transport = select(
        &[
            Transport::Stream,
            Transport::Stream,
            Transport::Datagram,
            Transport::Unspecified,
        ][..],
    );
    (ends(), transport, tlvs()).prop_map(move |((client, destination), transport, tlvs)| {
        let start = V2::proxied(client, destination, transport);
        let header = tlvs.iter().fold(start, |header, (kind, value)| {
            header.tlv(*kind, value).expect("it fits")
        });
        let bytes = if checksum {
            header.finish_with_crc32c().expect("it fits")
        } else {
            header.finish()
        };
        Sample {
            bytes,
            ends: (transport != Transport::Unspecified).then_some((client, destination)),
            transport,
            tlvs,
            checksum,
        }
    })
}

/// A v2 header from its bytes 13 and 14 and what follows the length.
pub(crate) fn v2(version_command: u8, addressing: u8, block: &[u8]) -> Vec<u8> {
    let mut bytes = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    bytes.extend([version_command, addressing]);
    bytes.extend(u16::try_from(block.len()).expect("a length").to_be_bytes());
    bytes.extend(block);
    bytes
}

fn v2_unix() -> impl Strategy<Value = Sample> {
    (vec(any::<u8>(), 216), 1..=2u8).prop_map(|(block, transport)| Sample {
        transport: if transport == 1 {
            Transport::Stream
        } else {
            Transport::Datagram
        },
        ..Sample::local(v2(0x21, 0x30 | transport, &block))
    })
}

/// LOCAL with any addressing, and UNSPEC: whatever their block holds is skipped.
fn v2_discarded() -> impl Strategy<Value = Sample> {
    let first = prop_oneof![
        any::<u8>().prop_map(|addressing| (0x20, addressing)),
        (0..=2u8).prop_map(|transport| (0x21, transport)),
    ];
    (first, vec(any::<u8>(), 0..64))
        .prop_map(|((command, addressing), block)| Sample::local(v2(command, addressing, &block)))
}

/// One thing that happens to bytes.
#[derive(Debug, Clone)]
enum Damage {
    Replace(Index, u8),
    Insert(Index, u8),
    Remove(Index),
    Swap(Index, Index),
    CutShort(Index),
    Append(Vec<u8>),
}

fn damage() -> impl Strategy<Value = Damage> {
    // what the text form is made of, and what it must not have
    let byte = prop_oneof![
        3 => select(&b" \r\n\0\t+-.:%0123456789afFgxPRTCU"[..]),
        1 => any::<u8>(),
    ];
    prop_oneof![
        4 => (any::<Index>(), byte.clone()).prop_map(|(at, byte)| Damage::Replace(at, byte)),
        3 => (any::<Index>(), byte.clone()).prop_map(|(at, byte)| Damage::Insert(at, byte)),
        3 => any::<Index>().prop_map(Damage::Remove),
        2 => any::<(Index, Index)>().prop_map(|(a, b)| Damage::Swap(a, b)),
        1 => any::<Index>().prop_map(Damage::CutShort),
        2 => vec(byte, 0..20).prop_map(Damage::Append),
    ]
}

/// A valid header after up to three accidents, with what follows it.
pub(crate) fn damaged() -> impl Strategy<Value = Vec<u8>> {
    (header(), vec(damage(), 0..=3)).prop_map(|(sample, accidents)| {
        let mut bytes = sample.bytes;
        for accident in accidents {
            if bytes.is_empty() {
                break;
            }
            let length = bytes.len();
            match accident {
                Damage::Replace(at, byte) => bytes[at.index(length)] = byte,
                Damage::Insert(at, byte) => bytes.insert(at.index(length + 1), byte),
                Damage::Remove(at) => drop(bytes.remove(at.index(length))),
                Damage::Swap(a, b) => bytes.swap(a.index(length), b.index(length)),
                Damage::CutShort(at) => bytes.truncate(at.index(length)),
                Damage::Append(more) => bytes.extend(more),
            }
        }
        bytes
    })
}

const STARTS: &[&[u8]] = &[
    b"",
    b"PROXY ",
    b"PROXY TCP4 ",
    b"PROXY TCP6 ",
    b"PROXY UNKNOWN",
    b"\r\n\r\n\0\r\nQUIT\n",
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0",
    b"\r\n\r\n\0\r\nQUIT\n\x21\x21\0",
];

/// Bytes that have nothing to do with a header, or begin like one.
pub(crate) fn noise() -> impl Strategy<Value = Vec<u8>> {
    let start = select(STARTS);
    let rest = prop_oneof![
        vec(any::<u8>(), 0..300),
        "[0-9a-f:. \r\n]{0,120}".prop_map(String::into_bytes),
    ];
    (start, rest).prop_map(|(start, rest)| [start, &rest].concat())
}
