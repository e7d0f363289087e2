//! Simple Proxy Protocol, the UDP header of Cloudflare Spectrum and Tencent EdgeOne: bytes in, "what it says" out.
//!
//! Owns: the 38 bytes that stand before every payload, in both directions. Must not know: sockets, flows.
//!
//! All fields in network order: magic `56 EC`, the client's address (16 bytes, IPv4 as `::ffff:a.b.c.d`),
//! the address of the proxy that the client sent to (16), the client's port (2), the proxy's port (2). The
//! service's answer carries the *same* header, unchanged: the client stays the client. So a header is kept
//! as the bytes that came, and what is read from it is a view of them.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::model::ClientAddr;

/// The first two bytes of every header.
pub const MAGIC: [u8; 2] = [0x56, 0xec];

/// The length of every header in bytes.
pub const LENGTH: usize = 38;

/// A header, as it was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Spp([u8; LENGTH]);

/// Why a datagram does not begin with a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SppError {
    /// Shorter than [`LENGTH`].
    #[error("datagram of {0} bytes, shorter than the {LENGTH} of a simple proxy protocol header")]
    Truncated(usize),
    /// Something else than [`MAGIC`] in front.
    #[error("no simple proxy protocol header: the datagram begins with {0:02x} {1:02x}, not 56 ec")]
    Magic(u8, u8),
}

impl Spp {
    /// A header between these two addresses, an IPv4 one mapped into IPv6.
    pub fn new(client: SocketAddr, proxy: SocketAddr) -> Self {
        let mut bytes = [0; LENGTH];
        bytes[..2].copy_from_slice(&MAGIC);
        bytes[2..18].copy_from_slice(&mapped(client.ip()).octets());
        bytes[18..34].copy_from_slice(&mapped(proxy.ip()).octets());
        bytes[34..36].copy_from_slice(&client.port().to_be_bytes());
        bytes[36..38].copy_from_slice(&proxy.port().to_be_bytes());
        Self(bytes)
    }

    /// Reads the header in front of a datagram; its payload is what stands behind [`LENGTH`] bytes.
    ///
    /// # Errors
    /// When the datagram does not begin with a whole header. The two addresses can be anything.
    #[inline]
    pub fn decode(datagram: &[u8]) -> Result<Self, SppError> {
        match datagram {
            &[first, second, ..] if [first, second] != MAGIC => Err(SppError::Magic(first, second)),
            _ => match datagram.first_chunk::<LENGTH>() {
                Some(bytes) => Ok(Self(*bytes)),
                None => Err(SppError::Truncated(datagram.len())),
            },
        }
    }

    /// The header as it was received, which is what an answer begins with.
    #[inline]
    pub fn bytes(&self) -> &[u8; LENGTH] {
        &self.0
    }

    /// Who sent the datagram to the proxy, unchecked: any address and port.
    #[inline]
    pub fn client(&self) -> ClientAddr {
        ClientAddr::new(self.socket_address(2, 34))
    }

    /// Where the client sent it to, IPv4-mapped addresses as IPv4.
    #[inline]
    pub fn proxy(&self) -> SocketAddr {
        let addr = self.socket_address(18, 36);
        SocketAddr::new(addr.ip().to_canonical(), addr.port())
    }

    #[inline]
    fn socket_address(&self, address_at: usize, port_at: usize) -> SocketAddr {
        let mut address = [0; 16];
        address.copy_from_slice(&self.0[address_at..address_at + 16]);
        let port = u16::from_be_bytes([self.0[port_at], self.0[port_at + 1]]);
        SocketAddr::new(Ipv6Addr::from(address).into(), port)
    }
}

fn mapped(addr: IpAddr) -> Ipv6Addr {
    match addr {
        IpAddr::V4(addr) => addr.to_ipv6_mapped(),
        IpAddr::V6(addr) => addr,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Written by hand from Cloudflare's description of the format.
    const EXAMPLE: [u8; LENGTH] = [
        0x56, 0xec, //
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 7, // client
        0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, // proxy
        0xdc, 0x04, // 56324
        0x01, 0xbb, // 443
    ];

    #[test]
    fn fields_of_an_example() {
        let mut datagram = EXAMPLE.to_vec();
        datagram.extend(b"payload");
        let header = Spp::decode(&datagram).unwrap();
        assert_eq!(header.client().to_string(), "192.0.2.7:56324");
        assert_eq!(header.proxy().to_string(), "[2001:db8::1]:443");
        assert_eq!(header.bytes(), &EXAMPLE);
    }

    #[test]
    fn cut_at_every_byte() {
        for length in 0..LENGTH {
            assert_eq!(
                Spp::decode(&EXAMPLE[..length]),
                Err(SppError::Truncated(length))
            );
        }
    }

    #[test]
    fn another_magic() {
        let mut datagram = EXAMPLE;
        datagram[1] = 0xed;
        assert_eq!(Spp::decode(&datagram), Err(SppError::Magic(0x56, 0xed)));
        assert_eq!(Spp::decode(b"GET"), Err(SppError::Magic(b'G', b'E')));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            client: [u8; 16], proxy: [u8; 4], client_port: u16, proxy_port: u16, payload: Vec<u8>,
        ) {
            let client = SocketAddr::new(IpAddr::from(client), client_port);
            let proxy = SocketAddr::new(IpAddr::from(proxy), proxy_port);
            let mut datagram = Spp::new(client, proxy).bytes().to_vec();
            datagram.extend(&payload);
            let header = Spp::decode(&datagram).unwrap();
            prop_assert_eq!(header.client(), ClientAddr::new(client));
            prop_assert_eq!(header.proxy(), proxy);
            prop_assert_eq!(&datagram[..LENGTH], header.bytes());
        }
    }
}
