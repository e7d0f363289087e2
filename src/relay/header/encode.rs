//! Writing headers: for `probe`, `demo` and the tests.

use std::fmt::Write;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use super::{Transport, tlv, v2};

/// The v1 header of a connection without a client: the proxy's own.
pub const V1_UNKNOWN: &[u8] = b"PROXY UNKNOWN\r\n";

/// A v2 header would be longer than its length field can say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a v2 header holds at most 65535 bytes of addresses and TLVs")]
pub struct EncodeError;

/// A v1 header. When the families differ both addresses are written as IPv6, the IPv4 one mapped.
pub fn encode_v1(client: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let (protocol, source, target) = match same_family(client.ip(), destination.ip()) {
        (IpAddr::V4(client), IpAddr::V4(destination)) => {
            ("TCP4", IpAddr::V4(client), IpAddr::V4(destination))
        }
        (client, destination) => ("TCP6", client, destination),
    };
    let mut line = String::with_capacity(super::MAX_V1);
    // writing to a String cannot fail
    let _ = write!(
        line,
        "PROXY {protocol} {source} {target} {} {}\r\n",
        client.port(),
        destination.port()
    );
    line.into_bytes()
}

/// A v2 header of a TCP connection without TLVs. Families that differ as in [`encode_v1`].
pub fn encode_v2(client: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    V2::proxied(client, destination, Transport::Stream).finish()
}

/// A v2 header in the making.
#[derive(Debug, Clone)]
#[must_use]
pub struct V2 {
    bytes: Vec<u8>,
}

impl V2 {
    /// PROXY, with both addresses. Families that differ as in [`encode_v1`].
    pub fn proxied(client: SocketAddr, destination: SocketAddr, transport: Transport) -> Self {
        let (source, target) = same_family(client.ip(), destination.ip());
        let family = if source.is_ipv4() { 1 } else { 2 };
        let transport = match transport {
            Transport::Unspecified => 0,
            Transport::Stream => 1,
            Transport::Datagram => 2,
        };
        let mut header = Self::begin(1, family << 4 | transport);
        for address in [source, target] {
            match address {
                IpAddr::V4(address) => header.bytes.extend(address.octets()),
                IpAddr::V6(address) => header.bytes.extend(address.octets()),
            }
        }
        header.bytes.extend(client.port().to_be_bytes());
        header.bytes.extend(destination.port().to_be_bytes());
        header
    }

    /// LOCAL: the proxy's own connection, a health check for example.
    pub fn local() -> Self {
        Self::begin(0, 0)
    }

    /// PROXY for a client whose address is not known.
    pub fn unspec() -> Self {
        Self::begin(1, 0)
    }

    fn begin(command: u8, addressing: u8) -> Self {
        let mut bytes = v2::SIGNATURE.to_vec();
        bytes.extend([2 << 4 | command, addressing, 0, 0]);
        Self { bytes }
    }

    /// Appends a TLV.
    ///
    /// # Errors
    /// When the header gets longer than the format allows.
    pub fn tlv(mut self, kind: u8, value: &[u8]) -> Result<Self, EncodeError> {
        let length = u16::try_from(value.len()).map_err(|_| EncodeError)?;
        self.bytes.push(kind);
        self.bytes.extend(length.to_be_bytes());
        self.bytes.extend(value);
        if self.bytes.len() - v2::FIXED > usize::from(u16::MAX) {
            return Err(EncodeError);
        }
        Ok(self)
    }

    /// The header without a checksum.
    pub fn finish(mut self) -> Vec<u8> {
        self.set_length();
        self.bytes
    }

    /// The header with a CRC32C as its last TLV.
    ///
    /// # Errors
    /// As [`V2::tlv`].
    pub fn finish_with_crc32c(self) -> Result<Vec<u8>, EncodeError> {
        let mut header = self.tlv(tlv::CRC32C, &[0; 4])?;
        header.set_length();
        let value_at = header.bytes.len() - 4;
        let checksum = tlv::checksum_of(&header.bytes, value_at);
        header.bytes[value_at..].copy_from_slice(&checksum.to_be_bytes());
        Ok(header.bytes)
    }

    fn set_length(&mut self) {
        // `tlv` keeps the rest within 16 bits
        let length = (self.bytes.len() - v2::FIXED) as u16;
        self.bytes[v2::FIXED - 2..v2::FIXED].copy_from_slice(&length.to_be_bytes());
    }
}

/// Both addresses in one family: the format has no place for two.
fn same_family(client: IpAddr, destination: IpAddr) -> (IpAddr, IpAddr) {
    let mapped = |addr: IpAddr| -> Ipv6Addr {
        match addr {
            IpAddr::V4(addr) => addr.to_ipv6_mapped(),
            IpAddr::V6(addr) => addr,
        }
    };
    if client.is_ipv4() == destination.is_ipv4() {
        (client, destination)
    } else {
        (mapped(client).into(), mapped(destination).into())
    }
}
