//! What bytes that are no header look like: only what can be told with certainty.

const HTTP: &str = "an HTTP request";
const SMTP: &str = "an SMTP greeting";
const POSTGRESQL: &str = "a PostgreSQL start-up message";

/// Names the protocol that `bytes` begin with, as a noun phrase ("an SSH banner"), for a log line.
///
/// Some protocols are known by their first bytes, others only when the whole first message is there;
/// a server that speaks first (MySQL) leaves nothing to look at.
pub fn looks_like(bytes: &[u8]) -> Option<&'static str> {
    const PREFIXES: [(&[u8], &str); 19] = [
        (b"SSH-", "an SSH banner"),
        (b"PRI * HTTP/2", "an HTTP/2 preface"),
        (b"GET ", HTTP),
        (b"HEAD ", HTTP),
        (b"POST ", HTTP),
        (b"PUT ", HTTP),
        (b"PATCH ", HTTP),
        (b"DELETE ", HTTP),
        (b"OPTIONS ", HTTP),
        (b"CONNECT ", HTTP),
        (b"TRACE ", HTTP),
        (b"EHLO ", SMTP),
        (b"HELO ", SMTP),
        (b"ehlo ", SMTP),
        (b"helo ", SMTP),
        (b"LHLO ", "an LMTP greeting"),
        (b"\0\0\0\x08\x04\xd2\x16\x2f", POSTGRESQL),
        (b"\0\0\0\x08\x04\xd2\x16\x30", POSTGRESQL),
        (b"\0\0\0\x10\x04\xd2\x16\x2e", POSTGRESQL),
    ];
    let by_prefix = PREFIXES
        .iter()
        .find_map(|&(prefix, name)| bytes.starts_with(prefix).then_some(name));
    by_prefix.or_else(|| {
        Some(match bytes {
            // TLS record: handshake, version 3.x, length, then handshake type 1
            [0x16, 3, 0..=4, _, _, 1, ..] => "a TLS ClientHello",
            // TPKT version 3 around an X.224 connection request
            [3, 0, high, low, indicator, 0xe0, ..]
                if u16::from_be_bytes([*high, *low]) == u16::from(*indicator) + 5 =>
            {
                "an RDP connection request"
            }
            // Simple Proxy Protocol: magic, two addresses, two ports
            [0x56, 0xec, ..] if bytes.len() >= 38 => "a Simple Proxy Protocol header",
            _ if is_postgresql_startup(bytes) => POSTGRESQL,
            _ if is_minecraft_handshake(bytes) => "a Minecraft handshake",
            _ if is_dns_query(bytes) => "a DNS query",
            _ => return None,
        })
    })
}

/// Length, protocol 3.x, then names and values that begin with `user` in every known client.
fn is_postgresql_startup(bytes: &[u8]) -> bool {
    let Some((&[a, b, c, d, 0, 3, 0, _], rest)) = bytes.split_first_chunk::<8>() else {
        return false;
    };
    let length = u32::from_be_bytes([a, b, c, d]);
    (9..=10_000).contains(&length) && rest.starts_with(b"user\0")
}

/// Packet length, packet 0, protocol version, server address, port, next state 1 to 3.
fn is_minecraft_handshake(bytes: &[u8]) -> bool {
    fn handshake(bytes: &[u8]) -> Option<bool> {
        let (length, rest) = varint(bytes)?;
        let packet = rest.get(..length)?;
        let (&id, rest) = packet.split_first()?;
        let (_version, rest) = varint(rest)?;
        let (name, rest) = varint(rest)?;
        let (name, rest) = rest.split_at_checked(name)?;
        Some(
            id == 0
                && !name.is_empty()
                && std::str::from_utf8(name).is_ok()
                && matches!(rest, [_, _, 1..=3]),
        )
    }
    handshake(bytes).unwrap_or(false)
}

/// Seven bits a byte, the lowest first, at most five bytes; -1 (an unknown version) takes all five.
fn varint(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let mut value = 0u64;
    for (place, &byte) in bytes.iter().enumerate().take(5) {
        value |= u64::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            return Some((usize::try_from(value).ok()?, &bytes[place + 1..]));
        }
    }
    None
}

/// Over TCP: length, identifier, a query's flags, one question, no answers, a name that ends in its place.
fn is_dns_query(bytes: &[u8]) -> bool {
    fn query(bytes: &[u8]) -> Option<bool> {
        let (&[high, low], message) = bytes.split_first_chunk::<2>()?;
        let (&fixed, mut name) = message.split_first_chunk::<12>()?;
        // QR, opcode, AA and TC are clear, and the response code
        let is_query = fixed[2] & 0b1111_1110 == 0 && fixed[3] & 0x0f == 0;
        let counts = fixed[4..10] == [0, 1, 0, 0, 0, 0] && fixed[10] == 0 && fixed[11] <= 2;
        loop {
            let (&label, rest) = name.split_first()?;
            if label == 0 {
                // type and class IN
                let in_class = matches!(rest, [_, _, 0, 1, ..]);
                let whole = message.len() == usize::from(u16::from_be_bytes([high, low]));
                return Some(is_query && counts && in_class && whole);
            }
            name = rest.get(usize::from(label)..).filter(|_| label < 64)?;
        }
    }
    query(bytes).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINECRAFT: &[u8] = b"\x10\x00\xff\x05\x09localhost\x63\xdd\x02";
    const DNS: &[u8] =
        b"\x00\x1d\xab\xcd\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x03org\x00\x00\x1c\x00\x01";

    #[test]
    fn known_protocols() {
        let spp = [&b"\x56\xec"[..], &[0; 36]].concat();
        for (bytes, name) in [
            (&b"SSH-2.0-OpenSSH_9.7\r\n"[..], "an SSH banner"),
            (
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
                "a TLS ClientHello",
            ),
            (b"GET / HTTP/1.1\r\n", HTTP),
            (b"PUT /a HTTP/1.1\r\n", HTTP),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "an HTTP/2 preface"),
            (b"EHLO mail.example.org\r\n", SMTP),
            (b"\0\0\0\x08\x04\xd2\x16\x2f", POSTGRESQL),
            (
                b"\0\0\0\x20\0\x03\0\0user\0me\0database\0it\0\0",
                POSTGRESQL,
            ),
            (
                b"\x03\x00\x00\x13\x0e\xe0\0\0\0\0\0\x01\0\x08\0\x03\0\0\0",
                "an RDP connection request",
            ),
            (MINECRAFT, "a Minecraft handshake"),
            (DNS, "a DNS query"),
            (&spp, "a Simple Proxy Protocol header"),
        ] {
            assert_eq!(looks_like(bytes), Some(name), "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn nothing_is_claimed_without_certainty() {
        for bytes in [
            &b""[..],
            b"\0",
            b"GET",
            b"GETTING ON",
            b"hello\r\n",
            b"\x16\x03\x01",
            b"\x16\x03\x01\0\x05\x02",
            b"\x56\xec",
            b"\0\0\0\x08\0\0\0\0",
            b"\x03\x00\x00\x13\x0f\xe0",
            b"\xff\xff\xff\xff\xff\xff\xff\xff",
            b"PROXY TCP4 ",
        ] {
            assert_eq!(looks_like(bytes), None, "{}", bytes.escape_ascii());
        }
        // these two are known by fitting together as a whole
        for whole in [MINECRAFT, DNS] {
            for cut in 0..whole.len() {
                assert_eq!(looks_like(&whole[..cut]), None);
            }
        }
    }
}
