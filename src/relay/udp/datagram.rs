//! What a datagram from a proxy says: pure.
//!
//! Owns: where each kind of sender puts its header, and what makes a datagram unfit. Must not know: flows,
//! sockets, who may send.
//!
//! The choices, where nothing is written down for UDP:
//!
//! - The header and the payload's beginning come in one datagram: a header that is not whole is a mistake.
//! - v1 is refused by name, in every mode; and so is the header of another mode's senders, where it cannot be
//!   payload.
//! - The header's transport is not looked at: a balancer that took a query over TCP or HTTPS and asks on over
//!   UDP (dnsdist does) says STREAM, truthfully.
//! - With `first`, a datagram carries a header if and only if it begins with the twelve bytes of the v2
//!   signature. What else begins like a header (SIP keeps its flows alive with CR LF CR LF) is payload. So a
//!   client whose *later* datagrams begin with these bytes is believed: no receiver can tell such a datagram
//!   from a new flow on the same proxy port. Where the sender can do `every` or `spp`, these are safer.

use std::net::SocketAddr;

use crate::model::{ClientAddr, UdpHeader};
use crate::relay::header::{self, Decoded, Endpoints, HeaderError, Version};
use crate::relay::spp::{self, Spp, SppError};

/// What begins every v2 header.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// What begins every v1 header.
const VERSION1: &[u8; 6] = b"PROXY ";

/// A datagram that can be passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Datagram {
    /// It has a header in front.
    Headed {
        /// Whose it is.
        client: Client,
        /// Where the payload begins, in bytes from the datagram's start; its end means that there is none.
        payload: usize,
    },
    /// It is payload from its first byte, of whichever client its flow has.
    Bare,
}

/// Whose datagram it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// A v2 header names it.
    Named {
        /// Unchecked: any address and port.
        client: ClientAddr,
        /// Where the client sent it to, as the proxy says.
        asked: SocketAddr,
    },
    /// A Simple Proxy Protocol header names it, unchecked.
    Spp(Spp),
    /// LOCAL or UNSPEC: the proxy's own.
    Proxy,
}

/// Why a datagram cannot be passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DatagramError {
    /// Not a byte.
    #[error("an empty datagram")]
    Empty,
    /// A v1 header.
    #[error(
        "a PROXY header of version 1, which is not defined for UDP: let the proxy send version 2"
    )]
    Version1,
    /// A v2 header, where Simple Proxy Protocol is expected.
    #[error(
        "a PROXY header of version 2, where one of Simple Proxy Protocol is expected: set udp-header=every or \
         udp-header=first, as the proxy sends it"
    )]
    Version2,
    /// A Simple Proxy Protocol header, where one of PROXY is expected.
    #[error(
        "a header of Simple Proxy Protocol, where a PROXY header is expected: set udp-header=spp"
    )]
    Simple,
    /// It does not begin with a v2 header.
    #[error(transparent)]
    Header(HeaderError),
    /// The datagram ends before its v2 header does.
    #[error("the datagram ends inside its PROXY header")]
    Truncated,
    /// It does not begin with a Simple Proxy Protocol header.
    #[error(transparent)]
    Spp(SppError),
}

/// Reads a datagram as a sender of this kind means it.
///
/// # Errors
/// When it is not what such a sender sends.
#[inline]
pub fn read(mode: UdpHeader, bytes: &[u8]) -> Result<Datagram, DatagramError> {
    if bytes.is_empty() {
        return Err(DatagramError::Empty);
    }
    match mode {
        UdpHeader::Every => version2(bytes),
        UdpHeader::First if bytes.starts_with(SIGNATURE) => version2(bytes),
        UdpHeader::First => match header::decode(bytes) {
            Ok(Decoded::Complete { .. }) => Err(DatagramError::Version1),
            _ => Ok(Datagram::Bare),
        },
        UdpHeader::Spp => match Spp::decode(bytes) {
            Ok(header) => Ok(Datagram::Headed {
                client: Client::Spp(header),
                payload: spp::LENGTH,
            }),
            Err(_) if bytes.starts_with(VERSION1) => Err(DatagramError::Version1),
            Err(_) if bytes.starts_with(SIGNATURE) => Err(DatagramError::Version2),
            Err(error) => Err(DatagramError::Spp(error)),
        },
    }
}

/// Another kind of header than the flows of `first` begin with, in front of what is nobody's: names the
/// mistake, where the datagram alone may be payload as well.
pub fn foreign_header(bytes: &[u8]) -> Option<DatagramError> {
    if bytes.starts_with(VERSION1) {
        return Some(DatagramError::Version1);
    }
    Spp::decode(bytes).ok().map(|_| DatagramError::Simple)
}

#[inline]
fn version2(bytes: &[u8]) -> Result<Datagram, DatagramError> {
    match header::decode(bytes) {
        Ok(Decoded::Complete { header, length }) => match (header.version, header.endpoints) {
            (Version::V1, _) => Err(DatagramError::Version1),
            (
                Version::V2,
                Endpoints::Proxied {
                    client,
                    destination,
                },
            ) => Ok(Datagram::Headed {
                client: Client::Named {
                    client,
                    asked: destination,
                },
                payload: length,
            }),
            (Version::V2, Endpoints::Local) => Ok(Datagram::Headed {
                client: Client::Proxy,
                payload: length,
            }),
        },
        _ if bytes.starts_with(VERSION1) => Err(DatagramError::Version1),
        Ok(Decoded::Incomplete) => Err(DatagramError::Truncated),
        Err(HeaderError::NotProxy) if Spp::decode(bytes).is_ok() => Err(DatagramError::Simple),
        Err(error) => Err(DatagramError::Header(error)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::relay::header::{Transport, V2, encode_v1};

    const MODES: [UdpHeader; 3] = [UdpHeader::Every, UdpHeader::First, UdpHeader::Spp];

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn v2(transport: Transport) -> Vec<u8> {
        V2::proxied(addr("192.0.2.7:5353"), addr("198.51.100.1:53"), transport).finish()
    }

    #[test]
    fn version_2_in_both_modes_and_with_any_transport() {
        for transport in [Transport::Datagram, Transport::Stream] {
            let mut bytes = v2(transport);
            let payload = bytes.len();
            for rest in [&b""[..], b"query"] {
                bytes.extend(rest);
                for mode in [UdpHeader::Every, UdpHeader::First] {
                    assert_eq!(
                        read(mode, &bytes),
                        Ok(Datagram::Headed {
                            client: Client::Named {
                                client: ClientAddr::new(addr("192.0.2.7:5353")),
                                asked: addr("198.51.100.1:53"),
                            },
                            payload,
                        })
                    );
                }
            }
        }
    }

    #[test]
    fn the_proxys_own() {
        for header in [V2::local().finish(), V2::unspec().finish()] {
            assert_eq!(
                read(UdpHeader::Every, &header),
                Ok(Datagram::Headed {
                    client: Client::Proxy,
                    payload: 16,
                })
            );
        }
    }

    #[test]
    fn cut_inside_the_header() {
        let header = v2(Transport::Datagram);
        for length in 1..header.len() {
            assert_eq!(
                read(UdpHeader::Every, &header[..length]),
                Err(DatagramError::Truncated)
            );
            let expected = match length {
                ..12 => Ok(Datagram::Bare),
                _ => Err(DatagramError::Truncated),
            };
            assert_eq!(read(UdpHeader::First, &header[..length]), expected);
        }
    }

    #[test]
    fn version_1_is_refused_by_name() {
        let mut bytes = encode_v1(addr("192.0.2.7:5353"), addr("198.51.100.1:53"));
        bytes.extend(b"query");
        for mode in MODES {
            assert_eq!(read(mode, &bytes), Err(DatagramError::Version1));
        }
        // cut off, and of a transport that there is not: with `first` both may be payload
        for bytes in [
            &b"PROXY TCP4 192."[..],
            b"PROXY UDP4 192.0.2.7 198.51.100.1 5353 53\r\nquery",
        ] {
            for mode in [UdpHeader::Every, UdpHeader::Spp] {
                assert_eq!(read(mode, bytes), Err(DatagramError::Version1));
            }
            assert_eq!(read(UdpHeader::First, bytes), Ok(Datagram::Bare));
            assert_eq!(foreign_header(bytes), Some(DatagramError::Version1));
        }
    }

    #[test]
    fn another_senders_header_is_named() {
        let mut simple = Spp::new(addr("192.0.2.7:5353"), addr("198.51.100.1:53"))
            .bytes()
            .to_vec();
        simple.extend(b"query");
        assert_eq!(read(UdpHeader::Every, &simple), Err(DatagramError::Simple));
        assert_eq!(read(UdpHeader::First, &simple), Ok(Datagram::Bare));
        assert_eq!(foreign_header(&simple), Some(DatagramError::Simple));
        let mut version2 = v2(Transport::Datagram);
        version2.extend(b"query");
        assert_eq!(
            read(UdpHeader::Spp, &version2),
            Err(DatagramError::Version2)
        );
        assert_eq!(foreign_header(b"query"), None);
    }

    #[test]
    fn payload_that_begins_like_a_header() {
        // SIP's keep-alive, and words
        for payload in [
            &b"\r\n\r\n"[..],
            b"PROXYING",
            b"PROXY ",
            b"\r\n\r\n\0\r\nQUIT",
        ] {
            assert_eq!(read(UdpHeader::First, payload), Ok(Datagram::Bare));
        }
    }

    proptest! {
        #[test]
        fn any_bytes(bytes: Vec<u8>) {
            for mode in MODES {
                match read(mode, &bytes) {
                    Ok(Datagram::Headed { payload, .. }) => prop_assert!(payload <= bytes.len()),
                    Ok(Datagram::Bare) => prop_assert_eq!(mode, UdpHeader::First),
                    Err(DatagramError::Empty) => prop_assert!(bytes.is_empty()),
                    Err(_) => {}
                }
            }
        }
    }
}
