//! What was typed → the bytes to send. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::cli::{Corruption, HeaderForm, ProbeArgs};
use crate::commands::UsageError;
use crate::relay::header::{MAX_V1, Transport, V1_UNKNOWN, V2, encode_v1, tlv};
use crate::relay::spp::Spp;

/// Whose connection the header says this is.
enum Said {
    Client(SocketAddr, SocketAddr),
    Local,
    Unknown,
    Unspec,
}

/// The header as asked for, spoiled where that is asked for.
pub(super) fn build(args: &ProbeArgs) -> Result<Vec<u8>, UsageError> {
    let said = said(args)?;
    if args.version == Some(HeaderForm::Spp) {
        return spp(args, &said);
    }
    let version = version(args, &said)?;
    let bytes = match version {
        1 => v1(args, &said),
        _ => v2(args, &said),
    }?;
    match args.corrupt {
        Some(how) => Ok(spoiled(bytes, how, version)),
        None => Ok(bytes),
    }
}

fn said(args: &ProbeArgs) -> Result<Said, UsageError> {
    if args.local {
        return Ok(Said::Local);
    }
    if args.unknown {
        return Ok(Said::Unknown);
    }
    if args.unspec {
        return Ok(Said::Unspec);
    }
    // only a header that is spoiled may do without: then it is about the header, not about the client
    let client = args
        .client
        .unwrap_or_else(|| SocketAddr::new(documentation(args.relay.ip()), 40_000));
    let destination = match args.destination {
        Some(destination) => destination,
        None if args.relay.is_ipv4() == client.is_ipv4() => args.relay,
        None => SocketAddr::new(documentation(client.ip()), args.relay.port()),
    };
    if client.is_ipv4() != destination.is_ipv4() {
        return Err(UsageError(format!(
            "client {client} and destination {destination} are not of one family, as a header has to have them: \
             an IPv4 address can be written as [::ffff:192.0.2.7]:40000"
        )));
    }
    Ok(Said::Client(client, destination))
}

/// An address of the same family that belongs to nobody (RFC 5737, RFC 3849).
fn documentation(family_of: IpAddr) -> IpAddr {
    match family_of {
        IpAddr::V4(_) => Ipv4Addr::new(192, 0, 2, 1).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
    }
}

/// A Simple Proxy Protocol header, which says who a client is and nothing else.
fn spp(args: &ProbeArgs, said: &Said) -> Result<Vec<u8>, UsageError> {
    let Said::Client(client, destination) = *said else {
        return Err(UsageError(
            "--version spp always names a client: --local, --unknown and --unspec exist in PROXY headers only"
                .to_owned(),
        ));
    };
    if !args.udp || args.first {
        return Err(UsageError(
            "--version spp is sent over UDP, on every datagram: give --udp, without --first"
                .to_owned(),
        ));
    }
    if args.crc32c || !args.tlv.is_empty() {
        return Err(UsageError(
            "TLVs and the CRC32C among them exist in version 2 only".to_owned(),
        ));
    }
    let mut bytes = Spp::new(client, destination).bytes().to_vec();
    match args.corrupt {
        None => {}
        Some(Corruption::Missing) => bytes.clear(),
        Some(Corruption::Truncated) => bytes.truncate(bytes.len() / 2),
        Some(Corruption::BadSignature) => bytes[1] = !bytes[1],
        Some(how) => {
            return Err(UsageError(format!(
                "--corrupt {} is not for headers of version spp",
                name(how)
            )));
        }
    }
    Ok(bytes)
}

/// The version asked for, or the only one that can say it.
fn version(args: &ProbeArgs, said: &Said) -> Result<u8, UsageError> {
    let asked = args.version.map(|form| match form {
        HeaderForm::V1 => 1,
        HeaderForm::V2 | HeaderForm::Spp => 2,
    });
    let only = |version: u8, what: &str, instead: &str| match asked {
        Some(asked) if asked != version => Err(UsageError(format!(
            "{what} exists in version {version} only{instead}"
        ))),
        _ => Ok(version),
    };
    let version = match said {
        Said::Local => only(2, "--local", ": --unknown says the same in version 1"),
        Said::Unspec => only(2, "--unspec", ": --unknown says the same in version 1"),
        Said::Unknown => only(1, "--unknown", ": --unspec says the same in version 2"),
        Said::Client(..) => Ok(asked.or(args.corrupt.and_then(home)).unwrap_or(2)),
    }?;
    match args.corrupt {
        Some(how) if home(how).is_some_and(|home| home != version) => Err(UsageError(format!(
            "--corrupt {} is not for headers of version {version}",
            name(how)
        ))),
        Some(how) if needs_client(how) && !matches!(said, Said::Client(..)) => {
            Err(UsageError(format!(
                "--corrupt {} needs a header that names a client: receivers skip that part of this one",
                name(how)
            )))
        }
        _ => Ok(version),
    }
}

fn v1(args: &ProbeArgs, said: &Said) -> Result<Vec<u8>, UsageError> {
    if args.crc32c || !args.tlv.is_empty() {
        return Err(UsageError(
            "TLVs and the CRC32C among them exist in version 2 only".to_owned(),
        ));
    }
    Ok(match *said {
        Said::Client(client, destination) => encode_v1(client, destination),
        Said::Local | Said::Unknown | Said::Unspec => V1_UNKNOWN.to_vec(),
    })
}

fn v2(args: &ProbeArgs, said: &Said) -> Result<Vec<u8>, UsageError> {
    let transport = if args.udp {
        Transport::Datagram
    } else {
        Transport::Stream
    };
    let mut header = match *said {
        Said::Client(client, destination) => V2::proxied(client, destination, transport),
        Said::Local => V2::local(),
        Said::Unknown | Said::Unspec => V2::unspec(),
    };
    let too_long = |error| UsageError(format!("too many TLVs: {error}"));
    for text in &args.tlv {
        let (kind, value) = parse_tlv(text)?;
        header = header.tlv(kind, &value).map_err(too_long)?;
    }
    if args.crc32c || args.corrupt == Some(Corruption::BadCrc) {
        header.finish_with_crc32c().map_err(too_long)
    } else {
        Ok(header.finish())
    }
}

/// `0xee=00ff`, `238=00ff` or `authority=example.org`.
fn parse_tlv(text: &str) -> Result<(u8, Vec<u8>), UsageError> {
    let wrong = |problem: String| {
        UsageError(format!(
            "--tlv '{text}': {problem}: expected a type and hexadecimal digits such as 0xee=00ff, \
             or alpn=, authority=, unique-id= or netns= and a text"
        ))
    };
    let (kind, value) = text
        .split_once('=')
        .ok_or_else(|| wrong("there is no '='".to_owned()))?;
    let named = match kind {
        "alpn" => Some(tlv::ALPN),
        "authority" => Some(tlv::AUTHORITY),
        "unique-id" => Some(tlv::UNIQUE_ID),
        "netns" => Some(tlv::NETNS),
        _ => None,
    };
    if let Some(kind) = named {
        return Ok((kind, value.as_bytes().to_vec()));
    }
    let number = match kind.strip_prefix("0x") {
        Some(digits) => u8::from_str_radix(digits, 16),
        None => kind.parse(),
    };
    let number = number.map_err(|_| wrong(format!("'{kind}' is no type from 0 to 255")))?;
    let value = from_hex(value).ok_or_else(|| wrong(format!("'{value}' is not hexadecimal")))?;
    Ok((number, value))
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text
        .chars()
        .map(|digit| {
            digit
                .to_digit(16)
                .and_then(|digit| u8::try_from(digit).ok())
        })
        .collect::<Option<_>>()?;
    let (pairs, []) = digits.as_chunks::<2>() else {
        return None;
    };
    Some(pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

fn name(how: Corruption) -> String {
    use clap::ValueEnum;
    how.to_possible_value()
        .map_or_else(String::new, |value| value.get_name().to_owned())
}

/// The one version that a corruption is made for.
fn home(how: Corruption) -> Option<u8> {
    use Corruption as C;
    match how {
        C::Missing | C::Truncated | C::BadSignature | C::BadFamily | C::OversizedLength => None,
        C::BadAddress | C::BadPort | C::BadEnd => Some(1),
        C::BadVersion | C::BadCommand | C::ShortLength | C::TruncatedTlv | C::BadCrc => Some(2),
    }
}

/// Whether it spoils what a receiver reads only for the client's sake.
fn needs_client(how: Corruption) -> bool {
    use Corruption as C;
    match how {
        C::Missing | C::Truncated | C::BadSignature | C::OversizedLength | C::BadEnd => false,
        C::BadVersion | C::BadCommand => false,
        C::BadFamily | C::BadAddress | C::BadPort => true,
        C::ShortLength | C::TruncatedTlv | C::BadCrc => true,
    }
}

/// A good header, made bad. `version` has fitting corruptions only, see [`version`].
fn spoiled(mut bytes: Vec<u8>, how: Corruption, version: u8) -> Vec<u8> {
    use Corruption as C;
    match (how, version) {
        (C::Missing, _) => bytes.clear(),
        (C::Truncated, _) => bytes.truncate(bytes.len() / 2),
        // the last byte of either signature
        (C::BadSignature, 1) => bytes[4] = b'X',
        (C::BadSignature, _) => bytes[11] = b'\r',
        (C::BadFamily, 1) => replace_word(&mut bytes, 1, "TCP5"),
        (C::BadFamily, _) => bytes[13] = 0x41,
        (C::OversizedLength, 1) => {
            bytes = b"PROXY UNKNOWN ".to_vec();
            bytes.resize(MAX_V1 - 1, b'x');
            bytes.extend(b"\r\n");
        }
        (C::OversizedLength, _) => bytes[14..16].fill(0xff),
        (C::BadAddress, _) => replace_word(&mut bytes, 2, "192.0.2.256"),
        (C::BadPort, _) => replace_word(&mut bytes, 4, "65536"),
        (C::BadEnd, _) => {
            bytes.truncate(bytes.len() - 2);
            bytes.push(b'\n');
        }
        (C::BadVersion, _) => bytes[12] = 0x30 | bytes[12] & 0x0f,
        (C::BadCommand, _) => bytes[12] |= 0x0f,
        (C::ShortLength, _) => bytes[14..16].copy_from_slice(&11u16.to_be_bytes()),
        (C::TruncatedTlv, _) => {
            // one byte where a TLV has three at least
            bytes.push(tlv::NOOP);
            let length = u16::from_be_bytes([bytes[14], bytes[15]]).saturating_add(1);
            bytes[14..16].copy_from_slice(&length.to_be_bytes());
        }
        (C::BadCrc, _) => {
            if let Some(last) = bytes.last_mut() {
                *last ^= 1;
            }
        }
    }
    bytes
}

/// Replaces one of the words of a v1 line, which are parted by single spaces.
fn replace_word(line: &mut Vec<u8>, number: usize, with: &str) {
    let mut words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    if let Some(word) = words.get_mut(number) {
        *word = with.as_bytes();
    }
    *line = words.join(&b' ');
}

#[cfg(test)]
mod tests {
    use clap::{Parser, ValueEnum};

    use super::*;
    use crate::cli::{Cli, Command};
    use crate::relay::header::{Decoded, decode};

    fn built(words: &str) -> Result<Vec<u8>, String> {
        let line = format!("mmproxyctl probe {words}");
        match Cli::try_parse_from(line.split_whitespace()) {
            Ok(Cli {
                command: Command::Probe(args),
                ..
            }) => build(&args).map_err(|error| error.to_string()),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn headers_as_asked_for() {
        for (words, header) in [
            (
                "192.0.2.9:22 --client 192.0.2.7:1 --version 1",
                &b"PROXY TCP4 192.0.2.7 192.0.2.9 1 22\r\n"[..],
            ),
            (
                "192.0.2.9:22 --client [2001:db8::7]:1 --version 1",
                b"PROXY TCP6 2001:db8::7 2001:db8::1 1 22\r\n",
            ),
            (
                "[::1]:22 --client 192.0.2.7:1 --version 1",
                b"PROXY TCP4 192.0.2.7 192.0.2.1 1 22\r\n",
            ),
            (
                "[::1]:22 --client [::ffff:192.0.2.7]:0 --destination [::2]:5 --version 1",
                b"PROXY TCP6 ::ffff:192.0.2.7 ::2 0 5\r\n",
            ),
            ("[::1]:22 --unknown", b"PROXY UNKNOWN\r\n"),
            ("[::1]:22 --local", b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"),
            (
                "[::1]:22 --unspec --tlv 0xee=00Ff --tlv 4=",
                b"\r\n\r\n\0\r\nQUIT\n\x21\0\0\x08\xee\0\x02\0\xff\x04\0\0",
            ),
            (
                "192.0.2.9:22 --client 192.0.2.7:1 --tlv unique-id=a=b",
                b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x12\xc0\0\x02\x07\xc0\0\x02\x09\0\x01\0\x16\x05\0\x03a=b",
            ),
            (
                "192.0.2.9:22 --client 192.0.2.7:1 --udp --first",
                b"\r\n\r\n\0\r\nQUIT\n\x21\x12\0\x0c\xc0\0\x02\x07\xc0\0\x02\x09\0\x01\0\x16",
            ),
            (
                "[::1]:22 --client [::2]:1 --udp --version spp",
                b"\x56\xec\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\x01\0\x16",
            ),
        ] {
            let bytes = built(words).unwrap();
            assert_eq!(
                bytes.escape_ascii().to_string(),
                header.escape_ascii().to_string(),
                "{words}"
            );
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (words, sentence) in [
            ("192.0.2.9:22", "--client <ADDR:PORT>"),
            ("192.0.2.9 --unknown", "such as 192.0.2.7:40000"),
            ("192.0.2.9:22 --client ::1:5", "[2001:db8::7]:40000"),
            (
                "192.0.2.9:22 --client 192.0.2.7:1 --local",
                "cannot be used with",
            ),
            ("192.0.2.9:22 --unspec --local", "cannot be used with"),
            (
                "192.0.2.9:22 --client 192.0.2.7:1 --version 3",
                "invalid value '3'",
            ),
            (
                "192.0.2.9:22 --client 192.0.2.7:1 --version spp",
                "give --udp",
            ),
            (
                "192.0.2.9:22 --client 192.0.2.7:1 --version spp --udp --first",
                "without --first",
            ),
            (
                "192.0.2.9:22 --local --version spp --udp",
                "always names a client",
            ),
            (
                "192.0.2.9:22 --client 192.0.2.7:1 --version spp --udp --crc32c",
                "exist in version 2 only",
            ),
            (
                "192.0.2.9:22 --client 192.0.2.7:1 --version spp --udp --corrupt bad-crc",
                "not for headers of version spp",
            ),
            ("192.0.2.9:22 --client 192.0.2.7:1 --first", "--udp"),
            (
                "192.0.2.9:22 --client 192.0.2.7:1 --udp --split 2",
                "cannot be used with",
            ),
            (
                "192.0.2.9:22 --local --destination 192.0.2.7:1",
                "cannot be used with",
            ),
            (
                "192.0.2.9:22 --client 192.0.2.7:1 --destination [::1]:2",
                "client 192.0.2.7:1 and destination [::1]:2 are not of one family",
            ),
            (
                "192.0.2.9:22 --local --version 1",
                "--local exists in version 2 only",
            ),
            (
                "192.0.2.9:22 --unknown --version 2",
                "--unknown exists in version 1 only",
            ),
            ("192.0.2.9:22 --unknown --crc32c", "exist in version 2 only"),
            (
                "192.0.2.9:22 --unknown --corrupt bad-crc",
                "bad-crc is not for headers of version 1",
            ),
            (
                "192.0.2.9:22 --client 192.0.2.7:1 --version 2 --corrupt bad-port",
                "bad-port is not for headers of version 2",
            ),
            (
                "192.0.2.9:22 --local --corrupt bad-crc",
                "needs a header that names a client",
            ),
            ("192.0.2.9:22 --local --tlv authority", "there is no '='"),
            ("192.0.2.9:22 --local --tlv 256=00", "'256' is no type"),
            ("192.0.2.9:22 --local --tlv sni=00", "'sni' is no type"),
            ("192.0.2.9:22 --local --tlv 1=0", "'0' is not hexadecimal"),
            ("192.0.2.9:22 --local --tlv 1=\u{e9}0", "is not hexadecimal"),
        ] {
            let error = built(words).expect_err(words);
            assert!(error.contains(sentence), "{words}: {error}");
        }
    }

    #[test]
    fn every_corruption_is_one() {
        for how in Corruption::value_variants() {
            for version in [1, 2] {
                for client in ["192.0.2.7:1", "[2001:db8::7]:1"] {
                    let words = format!(
                        "192.0.2.9:22 --client {client} --version {version} --corrupt {}",
                        name(*how)
                    );
                    if home(*how).is_some_and(|home| home != version) {
                        built(&words).unwrap_err();
                        continue;
                    }
                    let bytes = built(&words).unwrap();
                    match how {
                        Corruption::Missing => assert!(bytes.is_empty()),
                        Corruption::Truncated => {
                            assert_eq!(decode(&bytes), Ok(Decoded::Incomplete), "{words}");
                        }
                        _ => assert!(decode(&bytes).is_err(), "{words}"),
                    }
                }
            }
        }
    }
}
