//! The PROXY protocol, versions 1 and 2: bytes in, "what it says" out.
//!
//! Owns: decoding (incremental, strict, without allocation), encoding, and guessing what bytes that are
//! no header look like. Must not know: sockets, timeouts, who may send a header, what is done with it.
//!
//! The rules are those of HAProxy's `doc/proxy-protocol.txt` (2020/03/05). Where that text leaves the
//! receiver a choice, this one is made:
//!
//! - A wrong byte is an error as soon as it is read: "abort as soon as possible, so that the sender gets a
//!   chance to notice". `SSH-2.0` fails on its first byte and a bad v1 address before its line ends.
//! - LOCAL, and PROXY with family UNSPEC: [`Endpoints::Local`], the block is skipped unread, so neither
//!   its TLVs nor a checksum among them are looked at ("discard the protocol block").
//! - Transport UNSPEC and family UNIX: the client has no IP address that a service could be shown, so these
//!   are [`Endpoints::Local`] too ("falls back to the UNSPEC mode for the valid combinations that it does
//!   not support"); their block and TLVs are validated all the same.
//! - DGRAM is reported in [`Header::transport`]; who relays TCP refuses it.
//! - In IPv6 text the dotted end (`::ffff:192.0.2.1`) and leading zeros in a group are taken; a zone is not.
//!   IPv4-mapped addresses come out as IPv4.
//! - More than [`MAX_V2`] bytes, TLVs that do not fill their space exactly, a second CRC32C, and a unique id
//!   above 128 bytes are errors; unknown TLV types are not.

mod encode;
mod hint;
pub mod tlv;
mod v1;
mod v2;

use std::net::SocketAddr;

use crate::model::ClientAddr;

pub use encode::{EncodeError, V1_UNKNOWN, V2, encode_v1, encode_v2};
pub use hint::looks_like;
pub use tlv::Tlvs;

/// The longest v1 header in bytes, CRLF included.
pub const MAX_V1: usize = 107;

/// The longest v2 header in bytes that is accepted: the fixed part, and 4000 bytes of addresses and TLVs.
///
/// The format allows 64 kB. What senders emit stays well below 1 kB, certificates' names included.
pub const MAX_V2: usize = v2::FIXED + 520 + 3480;

/// What the bytes received so far are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decoded<'a> {
    /// The beginning of a header: call again with more of the same bytes.
    Incomplete,
    /// A whole header; bytes behind `length` are the client's first payload.
    Complete {
        /// What it says.
        header: Header<'a>,
        /// How many bytes it takes, at most [`MAX_V1`] or [`MAX_V2`].
        length: usize,
    },
}

/// A valid header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header<'a> {
    /// Which form it has.
    pub version: Version,
    /// Whose connection this is.
    pub endpoints: Endpoints,
    /// What kind of connection the client made to the proxy.
    pub transport: Transport,
    /// The extensions of a v2 header that names the client; else empty.
    pub tlvs: Tlvs<'a>,
}

/// The two forms of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// A line of text.
    V1,
    /// Binary.
    V2,
}

/// Whose connection this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoints {
    /// Made on behalf of a client.
    Proxied {
        /// Who connected to the proxy, unchecked: any address and port, also 0.0.0.0 and multicast.
        client: ClientAddr,
        /// Where the client connected to, IPv4-mapped addresses as IPv4.
        destination: SocketAddr,
    },
    /// LOCAL, UNKNOWN or UNSPEC: the proxy itself is the client, use the connection's own ends.
    Local,
}

/// What kind of connection the client made to the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Not said: LOCAL, UNKNOWN and UNSPEC.
    Unspecified,
    /// TCP, or a Unix stream.
    Stream,
    /// UDP, or Unix datagrams.
    Datagram,
}

/// Which of the two addresses of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The first: who connected.
    Client,
    /// The second: where to.
    Destination,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Client => "client",
            Self::Destination => "destination",
        })
    }
}

/// Why bytes are no header and never will be, whatever follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Neither form begins like this.
    #[error("no PROXY header: the bytes begin neither a v1 nor a v2 header")]
    NotProxy,
    /// No CRLF in [`MAX_V1`] bytes.
    #[error("v1 header has no CRLF within {MAX_V1} bytes")]
    V1TooLong,
    /// The second word.
    #[error("v1 protocol is none of TCP4, TCP6 and UNKNOWN")]
    V1Protocol,
    /// An address of a TCP4 line.
    #[error("v1 {0} address is not a plain IPv4 address followed by one space")]
    V1Ipv4(Side),
    /// An address of a TCP6 line.
    #[error("v1 {0} address is not an IPv6 address followed by one space")]
    V1Ipv6(Side),
    /// A port of a v1 line.
    #[error("v1 {0} port is not a plain number from 0 to 65535")]
    V1Port(Side),
    /// Something else where the line has to end.
    #[error("v1 header does not end with CRLF")]
    V1End,
    /// The high half of byte 13.
    #[error("v2 header has version {0}, not 2")]
    V2Version(u8),
    /// The low half of byte 13.
    #[error("v2 command {0} is neither LOCAL (0) nor PROXY (1)")]
    V2Command(u8),
    /// The high half of byte 14.
    #[error("v2 address family {0} is not known")]
    V2Family(u8),
    /// The low half of byte 14.
    #[error("v2 transport {0} is not known")]
    V2Transport(u8),
    /// More than [`MAX_V2`].
    #[error("v2 header announces {0} bytes, more than the {max} accepted", max = MAX_V2 - v2::FIXED)]
    V2TooLong(u16),
    /// Less than the family's addresses take.
    #[error("v2 header announces {announced} bytes, its addresses take {needed}")]
    V2TooShort {
        /// What the header says.
        announced: u16,
        /// What the addresses of its family take.
        needed: u16,
    },
    /// A TLV reaches beyond the header's end.
    #[error("v2 header ends inside a TLV")]
    TlvTruncated,
    /// A CRC32C value that is not four bytes.
    #[error("v2 CRC32C has {0} bytes, not 4")]
    ChecksumLength(u16),
    /// More than one CRC32C.
    #[error("v2 header has more than one CRC32C")]
    ChecksumTwice,
    /// The header was changed on its way.
    #[error("v2 CRC32C is {announced:#010x}, the header's is {computed:#010x}")]
    ChecksumMismatch {
        /// What the header says.
        announced: u32,
        /// What it amounts to.
        computed: u32,
    },
    /// A unique id above its limit.
    #[error("v2 unique id has {0} bytes, more than {max}", max = tlv::MAX_UNIQUE_ID)]
    UniqueIdLength(u16),
}

/// Reads the header that `bytes` begin with.
///
/// Pure: called with more of the same bytes it goes on to the same outcome, and bytes behind a header
/// never change it. Call it with at most what was received; it looks at no more than the header.
///
/// # Errors
/// When the bytes are no header, as early as that is certain.
#[inline]
pub fn decode(bytes: &[u8]) -> Result<Decoded<'_>, HeaderError> {
    match bytes.first() {
        None => Ok(Decoded::Incomplete),
        Some(b'P') => v1::decode(bytes),
        Some(b'\r') => v2::decode(bytes),
        Some(_) => Err(HeaderError::NotProxy),
    }
}

/// The endpoints of a header that names a client.
#[inline]
fn proxied(client: SocketAddr, destination: SocketAddr) -> Endpoints {
    Endpoints::Proxied {
        client: ClientAddr::new(client),
        destination: SocketAddr::new(destination.ip().to_canonical(), destination.port()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(bytes: &[u8]) -> Header<'_> {
        match decode(bytes) {
            Ok(Decoded::Complete { header, length }) if length == bytes.len() => header,
            other => panic!("{}: {other:?}", bytes.escape_ascii()),
        }
    }

    fn between(client: &str, destination: &str) -> Endpoints {
        Endpoints::Proxied {
            client: ClientAddr::new(client.parse().unwrap()),
            destination: destination.parse().unwrap(),
        }
    }

    #[test]
    fn v1_line() {
        let header = whole(b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n");
        assert_eq!(header.version, Version::V1);
        assert_eq!(header.transport, Transport::Stream);
        assert_eq!(
            header.endpoints,
            between("192.0.2.7:56324", "198.51.100.1:443")
        );
    }

    #[test]
    fn mapped_addresses_come_out_as_ipv4() {
        let header = whole(b"PROXY TCP6 ::ffff:192.0.2.7 ::FFFF:c633:6401 1 0\r\n");
        assert_eq!(header.endpoints, between("192.0.2.7:1", "198.51.100.1:0"));
    }

    #[test]
    fn v2_with_tlvs_and_checksum() {
        let (client, destination) = ("[2001:db8::1]:5", "[2001:db8::2]:22");
        let bytes = V2::proxied(
            client.parse().unwrap(),
            destination.parse().unwrap(),
            Transport::Stream,
        )
        .tlv(tlv::UNIQUE_ID, b"\0\xff")
        .unwrap()
        .tlv(tlv::AUTHORITY, b"example.org")
        .unwrap()
        .finish_with_crc32c()
        .unwrap();
        let header = whole(&bytes);
        assert_eq!(header.version, Version::V2);
        assert_eq!(header.endpoints, between(client, destination));
        assert_eq!(header.tlvs.unique_id(), Some(&b"\0\xff"[..]));
        assert_eq!(header.tlvs.authority(), Some("example.org"));
        assert_eq!(header.tlvs.iter().count(), 3);
    }

    #[test]
    fn headers_without_a_client() {
        for bytes in [
            V1_UNKNOWN,
            b"PROXY UNKNOWN what\rever\nthis is\r\n",
            &V2::local().finish(),
            &V2::unspec().finish(),
        ] {
            let header = whole(bytes);
            assert_eq!(header.endpoints, Endpoints::Local);
            assert_eq!(header.transport, Transport::Unspecified);
        }
    }
}
