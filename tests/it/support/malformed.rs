//! Bytes that are no PROXY header, each with what the decoder has to say about it: one table for the
//! decoder's tests and for those that send it to a running relay.

use mmproxyctl::relay::header::{MAX_V2, Transport, V2, tlv};

use crate::header::laws::crc32c;

/// Bytes that no receiver may take for a header, whatever follows them.
pub(crate) struct Malformed {
    /// What is wrong with them.
    pub(crate) name: &'static str,
    /// The whole of it; a receiver knows by the last byte at the latest.
    pub(crate) bytes: Vec<u8>,
    /// Part of the decoder's error.
    pub(crate) error: &'static str,
}

/// Every malformed header.
pub(crate) fn all() -> Vec<Malformed> {
    let text = text().into_iter().map(|(name, bytes, error)| Malformed {
        name,
        bytes: bytes.to_vec(),
        error,
    });
    let overlong = overlong();
    let binary = binary()
        .into_iter()
        .chain(checksums())
        .map(|(name, bytes, error)| Malformed { name, bytes, error });
    text.chain(overlong).chain(binary).collect()
}

const NO_HEADER: &str = "neither a v1 nor a v2";
const PROTOCOL: &str = "none of TCP4, TCP6 and UNKNOWN";
const CLIENT4: &str = "v1 client address is not a plain IPv4";
const CLIENT6: &str = "v1 client address is not an IPv6";
const DESTINATION4: &str = "v1 destination address is not a plain IPv4";
const DESTINATION6: &str = "v1 destination address is not an IPv6";
const CLIENT_PORT: &str = "v1 client port";
const DESTINATION_PORT: &str = "v1 destination port";
const END: &str = "does not end with CRLF";
const TOO_LONG: &str = "no CRLF within 107 bytes";

#[rustfmt::skip]
fn text() -> Vec<(&'static str, &'static [u8], &'static str)> {
    vec![
        ("SSH banner", b"SSH-2.0-OpenSSH_9.7\r\n", NO_HEADER),
        ("TLS ClientHello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", NO_HEADER),
        ("HTTP/1 request", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", NO_HEADER),
        ("HTTP request that begins with P", b"POST / HTTP/1.1\r\n\r\n", NO_HEADER),
        ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", NO_HEADER),
        ("empty lines", b"\r\n\r\n\r\n\r\n", NO_HEADER),
        ("line feed", b"\n", NO_HEADER),
        ("zero byte", b"\0", NO_HEADER),
        ("space before the header", b" PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n", NO_HEADER),
        ("byte order mark before the header", b"\xef\xbb\xbfPROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n", NO_HEADER),
        ("lower case", b"proxy tcp4 192.0.2.1 192.0.2.2 1 2\r\n", NO_HEADER),
        ("mixed case", b"Proxy TCP4 192.0.2.1 192.0.2.2 1 2\r\n", NO_HEADER),
        ("other word", b"PROXX TCP4 192.0.2.1 192.0.2.2 1 2\r\n", NO_HEADER),
        ("header without anything", b"PROXY\r\n", NO_HEADER),
        ("tab behind PROXY", b"PROXY\tTCP4 192.0.2.1 192.0.2.2 1 2\r\n", NO_HEADER),
        ("other byte behind PROXY", b"PROXYxTCP4 192.0.2.1 192.0.2.2 1 2\r\n", NO_HEADER),

        ("no protocol", b"PROXY \r\n", PROTOCOL),
        ("two spaces before the protocol", b"PROXY  TCP4 192.0.2.1 192.0.2.2 1 2\r\n", PROTOCOL),
        ("TCP5", b"PROXY TCP5 192.0.2.1 192.0.2.2 1 2\r\n", PROTOCOL),
        ("TCP without family", b"PROXY TCP 192.0.2.1 192.0.2.2 1 2\r\n", PROTOCOL),
        ("TCP46", b"PROXY TCP46 192.0.2.1 192.0.2.2 1 2\r\n", PROTOCOL),
        ("UDP4", b"PROXY UDP4 192.0.2.1 192.0.2.2 1 2\r\n", PROTOCOL),
        ("lower-case protocol", b"PROXY tcp4 192.0.2.1 192.0.2.2 1 2\r\n", PROTOCOL),
        ("protocol and nothing more", b"PROXY TCP4\r\n", PROTOCOL),
        ("UNKNOWN with a tail", b"PROXY UNKNOWNS\r\n", PROTOCOL),
        ("UNKNOWN cut short", b"PROXY UNKNOW\r\n", PROTOCOL),
        ("lower-case unknown", b"PROXY unknown\r\n", PROTOCOL),
        ("UNKNOWN ended by LF alone", b"PROXY UNKNOWN\n", PROTOCOL),
        ("UNKNOWN ended by CR alone", b"PROXY UNKNOWN\rSSH-2.0", END),

        ("no addresses", b"PROXY TCP4 \r\n", CLIENT4),
        ("two spaces before the client", b"PROXY TCP4  192.0.2.1 192.0.2.2 1 2\r\n", CLIENT4),
        ("leading zero in an octet", b"PROXY TCP4 192.0.02.1 192.0.2.2 1 2\r\n", CLIENT4),
        ("octal octet", b"PROXY TCP4 0177.0.0.1 192.0.2.2 1 2\r\n", CLIENT4),
        ("hexadecimal octet", b"PROXY TCP4 0x7f.0.0.1 192.0.2.2 1 2\r\n", CLIENT4),
        ("octet above 255", b"PROXY TCP4 192.0.2.256 192.0.2.2 1 2\r\n", CLIENT4),
        ("octet that overflows", b"PROXY TCP4 4294967488.0.2.1 192.0.2.2 1 2\r\n", CLIENT4),
        ("three octets", b"PROXY TCP4 192.0.2 192.0.2.2 1 2\r\n", CLIENT4),
        ("five octets", b"PROXY TCP4 192.0.2.1.1 192.0.2.2 1 2\r\n", CLIENT4),
        ("empty octet", b"PROXY TCP4 192..2.1 192.0.2.2 1 2\r\n", CLIENT4),
        ("address as one number", b"PROXY TCP4 3221225985 192.0.2.2 1 2\r\n", CLIENT4),
        ("negative octet", b"PROXY TCP4 -1.0.2.1 192.0.2.2 1 2\r\n", CLIENT4),
        ("host name", b"PROXY TCP4 localhost 192.0.2.2 1 2\r\n", CLIENT4),
        ("zero byte in an address", b"PROXY TCP4 192.0.2.1\0 192.0.2.2 1 2\r\n", CLIENT4),
        ("digit outside ASCII", "PROXY TCP4 192.0.2.\u{661} 192.0.2.2 1 2\r\n".as_bytes(), CLIENT4),
        ("IPv6 client in TCP4", b"PROXY TCP4 2001:db8::1 192.0.2.2 1 2\r\n", CLIENT4),
        ("address with a port", b"PROXY TCP4 192.0.2.1:1 192.0.2.2 1 2\r\n", CLIENT4),
        ("tab behind the client", b"PROXY TCP4 192.0.2.1\t192.0.2.2 1 2\r\n", CLIENT4),
        ("client and nothing more", b"PROXY TCP4 192.0.2.1\r\n", CLIENT4),
        ("bad destination", b"PROXY TCP4 192.0.2.1 192.0.2.999 1 2\r\n", DESTINATION4),
        ("IPv6 destination in TCP4", b"PROXY TCP4 192.0.2.1 2001:db8::1 1 2\r\n", DESTINATION4),
        ("two spaces before the destination", b"PROXY TCP4 192.0.2.1  192.0.2.2 1 2\r\n", DESTINATION4),
        ("no ports", b"PROXY TCP4 192.0.2.1 192.0.2.2\r\n", DESTINATION4),

        ("IPv4 client in TCP6", b"PROXY TCP6 192.0.2.1 2001:db8::2 1 2\r\n", CLIENT6),
        ("IPv4 destination in TCP6", b"PROXY TCP6 2001:db8::1 192.0.2.2 1 2\r\n", DESTINATION6),
        ("seven groups", b"PROXY TCP6 1:2:3:4:5:6:7 ::1 1 2\r\n", CLIENT6),
        ("nine groups", b"PROXY TCP6 1:2:3:4:5:6:7:8:9 ::1 1 2\r\n", CLIENT6),
        ("eight groups and a gap", b"PROXY TCP6 1:2:3:4::5:6:7:8 ::1 1 2\r\n", CLIENT6),
        ("two gaps", b"PROXY TCP6 1::2::3 ::1 1 2\r\n", CLIENT6),
        ("three colons", b"PROXY TCP6 ::: ::1 1 2\r\n", CLIENT6),
        ("one colon in front", b"PROXY TCP6 :1::2 ::1 1 2\r\n", CLIENT6),
        ("one colon behind", b"PROXY TCP6 1::2: ::1 1 2\r\n", CLIENT6),
        ("group of five digits", b"PROXY TCP6 2001:0db80::1 ::1 1 2\r\n", CLIENT6),
        ("no hexadecimal digit", b"PROXY TCP6 2001:dg8::1 ::1 1 2\r\n", CLIENT6),
        ("zone", b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n", CLIENT6),
        ("brackets", b"PROXY TCP6 [2001:db8::1] ::1 1 2\r\n", CLIENT6),
        ("prefix length", b"PROXY TCP6 2001:db8::1/64 ::1 1 2\r\n", CLIENT6),
        ("dotted octet above 255", b"PROXY TCP6 ::ffff:192.0.2.256 ::1 1 2\r\n", CLIENT6),
        ("dotted end of three octets", b"PROXY TCP6 ::ffff:192.0.2 ::1 1 2\r\n", CLIENT6),
        ("dotted end too far right", b"PROXY TCP6 1:2:3:4:5:6:7:192.0.2.1 ::1 1 2\r\n", CLIENT6),
        ("dotted part in the middle", b"PROXY TCP6 ::192.0.2.1:1 ::1 1 2\r\n", CLIENT6),
        ("bad IPv6 destination", b"PROXY TCP6 ::1 ::x 1 2\r\n", DESTINATION6),

        ("port with a plus", b"PROXY TCP4 192.0.2.1 192.0.2.2 +80 2\r\n", CLIENT_PORT),
        ("negative port", b"PROXY TCP4 192.0.2.1 192.0.2.2 -1 2\r\n", CLIENT_PORT),
        ("port with a leading zero", b"PROXY TCP4 192.0.2.1 192.0.2.2 080 2\r\n", CLIENT_PORT),
        ("port 00", b"PROXY TCP4 192.0.2.1 192.0.2.2 00 2\r\n", CLIENT_PORT),
        ("port 65536", b"PROXY TCP4 192.0.2.1 192.0.2.2 65536 2\r\n", CLIENT_PORT),
        ("port that overflows", b"PROXY TCP4 192.0.2.1 192.0.2.2 4294967297 2\r\n", CLIENT_PORT),
        ("named port", b"PROXY TCP4 192.0.2.1 192.0.2.2 http 2\r\n", CLIENT_PORT),
        ("hexadecimal port", b"PROXY TCP4 192.0.2.1 192.0.2.2 0x50 2\r\n", CLIENT_PORT),
        ("port with a fraction", b"PROXY TCP4 192.0.2.1 192.0.2.2 1.0 2\r\n", CLIENT_PORT),
        ("two spaces before the port", b"PROXY TCP4 192.0.2.1 192.0.2.2  1 2\r\n", CLIENT_PORT),
        ("one port", b"PROXY TCP4 192.0.2.1 192.0.2.2 1\r\n", CLIENT_PORT),
        ("two spaces between the ports", b"PROXY TCP4 192.0.2.1 192.0.2.2 1  2\r\n", DESTINATION_PORT),
        ("empty second port", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 \r\n", DESTINATION_PORT),
        ("second port with a plus", b"PROXY TCP6 ::1 ::2 1 +2\r\n", DESTINATION_PORT),
        ("second port 65536", b"PROXY TCP6 ::1 ::2 1 65536\r\n", DESTINATION_PORT),
        ("second port with a leading zero", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 02\r\n", DESTINATION_PORT),
        ("space before the line's end", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 \r\n", END),
        ("third port", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 3\r\n", END),
        ("zero byte before the line's end", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\0\r\n", END),
        ("line ended by LF alone", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\n", END),
        ("line ended by CR alone", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\rSSH-2.0", END),
        ("two CR", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\r\n", END),
    ]
}

fn overlong() -> Vec<Malformed> {
    let padded = |behind: usize, end: &str| {
        let mut line = b"PROXY UNKNOWN ".to_vec();
        line.resize(behind, b'x');
        line.extend(end.as_bytes());
        line
    };
    let full = "0001:0002:0003:0004:0005:0006:255.255.255.255";
    [
        ("UNKNOWN of 108 bytes", padded(106, "\r\n")),
        ("UNKNOWN that does not end", padded(400, "")),
        (
            "UNKNOWN with LF alone",
            padded(
                50,
                "\nSSH-2.0-OpenSSH_9.7\nSSH-2.0-OpenSSH_9.7\nSSH-2.0-OpenSSH_9.7\n",
            ),
        ),
        (
            "TCP6 of 116 bytes",
            format!("PROXY TCP6 {full} {full} 65535 65535\r\n").into_bytes(),
        ),
    ]
    .map(|(name, bytes)| Malformed {
        name,
        bytes,
        error: TOO_LONG,
    })
    .into()
}

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// A v2 header as it must not be: bytes 13 and 14, the announced length, what follows.
fn v2(version_command: u8, addressing: u8, announced: u16, block: &[u8]) -> Vec<u8> {
    let mut bytes = SIGNATURE.to_vec();
    bytes.extend([version_command, addressing]);
    bytes.extend(announced.to_be_bytes());
    bytes.extend(block);
    bytes
}

/// TCP over IPv4 with these bytes where the TLVs go.
fn v2_with_tlvs(tlvs: &[u8]) -> Vec<u8> {
    let block = [&[192, 0, 2, 1, 192, 0, 2, 2, 0, 1, 0, 2], tlvs].concat();
    v2(
        0x21,
        0x11,
        u16::try_from(block.len()).expect("it fits"),
        &block,
    )
}

#[rustfmt::skip]
fn binary() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let beyond = u16::try_from(MAX_V2 - 16 + 1).expect("it fits");
    vec![
        ("signature that ends otherwise", [&SIGNATURE[..11], b"\0\x21\x11\0\x0c", &[0; 12]].concat(), NO_HEADER),
        ("signature with a changed zero", b"\r\n\r\n0\r\nQUIT\n\x21\x11\0\x0c".to_vec(), NO_HEADER),
        ("signature after LF conversion", b"\n\n\0\nQUIT\n\x21\x11\0\x0c".to_vec(), NO_HEADER),
        ("version 0", v2(0x01, 0x11, 12, &[0; 12]), "version 0"),
        ("version 1", v2(0x11, 0x11, 12, &[0; 12]), "version 1"),
        ("version 3", v2(0x31, 0x11, 12, &[0; 12]), "version 3"),
        ("version and command swapped", v2(0x12, 0x11, 12, &[0; 12]), "version 1"),
        ("command 2", v2(0x22, 0x11, 12, &[0; 12]), "command 2"),
        ("command 15", v2(0x2f, 0x11, 12, &[0; 12]), "command 15"),
        ("family 4", v2(0x21, 0x41, 12, &[0; 12]), "family 4"),
        ("family 15", v2(0x21, 0xf1, 12, &[0; 12]), "family 15"),
        ("transport 3", v2(0x21, 0x13, 12, &[0; 12]), "transport 3"),
        ("transport 15", v2(0x21, 0x2f, 36, &[0; 36]), "transport 15"),
        ("unknown transport, family UNSPEC", v2(0x21, 0x03, 0, &[]), "transport 3"),
        ("TCP over IPv4 without addresses", v2(0x21, 0x11, 0, &[]), "announces 0 bytes, its addresses take 12"),
        ("TCP over IPv4, one byte short", v2(0x21, 0x11, 11, &[0; 11]), "announces 11 bytes, its addresses take 12"),
        ("UDP over IPv4, one byte short", v2(0x21, 0x12, 11, &[0; 11]), "announces 11 bytes, its addresses take 12"),
        ("TCP over IPv6 with IPv4 addresses", v2(0x21, 0x21, 12, &[0; 12]), "announces 12 bytes, its addresses take 36"),
        ("TCP over IPv6, one byte short", v2(0x21, 0x21, 35, &[0; 35]), "announces 35 bytes, its addresses take 36"),
        ("Unix, one byte short", v2(0x21, 0x31, 215, &[0; 215]), "announces 215 bytes, its addresses take 216"),
        ("one byte too long", v2(0x21, 0x11, beyond, &[0; 12]), "announces 4001 bytes, more than the 4000"),
        ("longest length", v2(0x21, 0x11, u16::MAX, &[0; 12]), "announces 65535 bytes"),
        ("LOCAL too long", v2(0x20, 0x00, u16::MAX, &[]), "announces 65535 bytes"),
        ("UNSPEC too long", v2(0x21, 0x00, beyond, &[]), "announces 4001 bytes"),
        ("one byte behind the addresses", v2_with_tlvs(&[tlv::NOOP]), "ends inside a TLV"),
        ("two bytes behind the addresses", v2_with_tlvs(&[tlv::NOOP, 0]), "ends inside a TLV"),
        ("TLV one byte longer than the header", v2_with_tlvs(&[tlv::NOOP, 0, 3, 1, 2]), "ends inside a TLV"),
        ("TLV of 65535 bytes", v2_with_tlvs(&[tlv::NOOP, 0xff, 0xff]), "ends inside a TLV"),
        ("second TLV cut short", v2_with_tlvs(&[tlv::NOOP, 0, 1, 0, tlv::ALPN, 0, 2, b'h']), "ends inside a TLV"),
        ("unknown TLV cut short", v2_with_tlvs(&[0xee, 0, 9]), "ends inside a TLV"),
        ("TLV cut short behind IPv6 addresses", v2(0x21, 0x21, 38, &[0; 38]), "ends inside a TLV"),
        ("TLV cut short behind Unix addresses", v2(0x21, 0x31, 217, &[0; 217]), "ends inside a TLV"),
        ("TLV cut short, transport UNSPEC", v2(0x21, 0x10, 13, &[0; 13]), "ends inside a TLV"),
        ("unique id of 129 bytes", v2_with_tlvs(&[&[tlv::UNIQUE_ID, 0, 129][..], &[7; 129]].concat()), "unique id has 129 bytes"),
    ]
}

fn checksums() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    const MISMATCH: &str = "v2 CRC32C is";
    let good = || {
        V2::proxied(
            "192.0.2.1:1".parse().expect("an address"),
            "192.0.2.2:2".parse().expect("an address"),
            Transport::Stream,
        )
        .tlv(tlv::AUTHORITY, b"example.org")
        .expect("it fits")
        .finish_with_crc32c()
        .expect("it fits")
    };
    let changed = |change: fn(&mut Vec<u8>)| {
        let mut bytes = good();
        change(&mut bytes);
        bytes
    };
    let end = good().len();
    assert_eq!(end, 16 + 12 + 3 + 11 + 3 + 4, "the positions below");
    vec![
        (
            "checksum of zero",
            changed(|bytes| bytes[45..].fill(0)),
            MISMATCH,
        ),
        (
            "checksum with a changed bit",
            changed(|bytes| bytes[48] ^= 1),
            MISMATCH,
        ),
        (
            "checksum in the wrong byte order",
            changed(|bytes| bytes[45..].reverse()),
            MISMATCH,
        ),
        (
            "client changed after the checksum",
            changed(|bytes| bytes[19] = 9),
            MISMATCH,
        ),
        (
            "port changed after the checksum",
            changed(|bytes| bytes[25] = 9),
            MISMATCH,
        ),
        (
            "TLV changed after the checksum",
            changed(|bytes| bytes[31] = b'E'),
            MISMATCH,
        ),
        (
            "transport changed after the checksum",
            changed(|bytes| bytes[13] = 0x12),
            MISMATCH,
        ),
        (
            "TLV added after the checksum",
            changed(|bytes| {
                bytes.extend([tlv::NOOP, 0, 0]);
                bytes[15] += 3;
            }),
            MISMATCH,
        ),
        (
            "checksum over the field as it is",
            changed(|bytes| {
                let over_all = crc32c(bytes);
                bytes[45..].copy_from_slice(&over_all.to_be_bytes());
            }),
            MISMATCH,
        ),
        (
            "empty checksum",
            v2_with_tlvs(&[tlv::CRC32C, 0, 0]),
            "CRC32C has 0 bytes",
        ),
        (
            "checksum of three bytes",
            v2_with_tlvs(&[tlv::CRC32C, 0, 3, 1, 2, 3]),
            "CRC32C has 3 bytes",
        ),
        (
            "checksum of five bytes",
            v2_with_tlvs(&[tlv::CRC32C, 0, 5, 1, 2, 3, 4, 5]),
            "CRC32C has 5 bytes",
        ),
        (
            "two checksums",
            v2_with_tlvs(&[tlv::CRC32C, 0, 4, 0, 0, 0, 0, tlv::CRC32C, 0, 4, 0, 0, 0, 0]),
            "more than one CRC32C",
        ),
    ]
}
