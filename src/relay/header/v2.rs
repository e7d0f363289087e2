//! Version 2: sixteen fixed bytes, the addresses of a family, TLVs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{
    Decoded, Endpoints, Header, HeaderError, MAX_V2, Tlvs, Transport, Version, proxied, tlv,
};

/// What every v2 header begins with.
pub(super) const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family and transport, length.
pub(super) const FIXED: usize = 16;

/// What the header asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Command {
    Local,
    Proxy,
}

/// Whose addresses the block has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    Unspecified,
    Inet,
    Inet6,
    Unix,
}

impl Family {
    /// How many bytes both addresses and ports take.
    fn block(self) -> u16 {
        match self {
            Self::Unspecified => 0,
            Self::Inet => 2 * (4 + 2),
            Self::Inet6 => 2 * (16 + 2),
            Self::Unix => 2 * 108,
        }
    }
}

/// Reads a v2 header.
pub(super) fn decode(bytes: &[u8]) -> Result<Decoded<'_>, HeaderError> {
    let known = bytes.len().min(SIGNATURE.len());
    if bytes[..known] != SIGNATURE[..known] {
        return Err(HeaderError::NotProxy);
    }
    let Some(&[version_command, family_transport, high, low]) = bytes.get(12..FIXED) else {
        // the fixed part is not there yet, but what is there may already be wrong
        if let Some(&byte) = bytes.get(12) {
            let command = command(byte)?;
            if let Some(&byte) = bytes.get(13) {
                addressing(command, byte)?;
            }
        }
        return Ok(Decoded::Incomplete);
    };
    let (family, transport) = addressing(command(version_command)?, family_transport)?;
    let announced = u16::from_be_bytes([high, low]);
    let length = FIXED + usize::from(announced);
    if length > MAX_V2 {
        return Err(HeaderError::V2TooLong(announced));
    }
    let needed = family.block();
    if announced < needed {
        return Err(HeaderError::V2TooShort { announced, needed });
    }
    let Some(header) = bytes.get(..length) else {
        return Ok(Decoded::Incomplete);
    };
    let tlvs = if family == Family::Unspecified {
        Tlvs::default()
    } else {
        tlv::validate(header, FIXED + usize::from(needed))?
    };
    let block = &header[FIXED..FIXED + usize::from(needed)];
    let endpoints = match family {
        _ if transport == Transport::Unspecified => Endpoints::Local,
        Family::Inet => inet(block),
        Family::Inet6 => inet6(block),
        Family::Unspecified | Family::Unix => Endpoints::Local,
    };
    Ok(Decoded::Complete {
        header: Header {
            version: Version::V2,
            endpoints,
            transport,
            tlvs,
        },
        length,
    })
}

/// Byte 13.
#[inline]
fn command(byte: u8) -> Result<Command, HeaderError> {
    match (byte >> 4, byte & 0x0f) {
        (2, 0) => Ok(Command::Local),
        (2, 1) => Ok(Command::Proxy),
        (2, command) => Err(HeaderError::V2Command(command)),
        (version, _) => Err(HeaderError::V2Version(version)),
    }
}

/// Byte 14, which LOCAL ignores.
#[inline]
fn addressing(command: Command, byte: u8) -> Result<(Family, Transport), HeaderError> {
    if command == Command::Local {
        return Ok((Family::Unspecified, Transport::Unspecified));
    }
    let family = match byte >> 4 {
        0 => Family::Unspecified,
        1 => Family::Inet,
        2 => Family::Inet6,
        3 => Family::Unix,
        family => return Err(HeaderError::V2Family(family)),
    };
    let transport = match byte & 0x0f {
        0 => Transport::Unspecified,
        1 => Transport::Stream,
        2 => Transport::Datagram,
        transport => return Err(HeaderError::V2Transport(transport)),
    };
    // a transport without an address is as good as none
    Ok(match family {
        Family::Unspecified => (family, Transport::Unspecified),
        _ => (family, transport),
    })
}

/// Two IPv4 addresses, two ports.
#[inline]
fn inet(block: &[u8]) -> Endpoints {
    let address = |at| -> IpAddr { Ipv4Addr::from(array::<4>(block, at)).into() };
    proxied(
        SocketAddr::new(address(0), port(block, 8)),
        SocketAddr::new(address(4), port(block, 10)),
    )
}

/// Two IPv6 addresses, two ports.
#[inline]
fn inet6(block: &[u8]) -> Endpoints {
    let address = |at| -> IpAddr { Ipv6Addr::from(array::<16>(block, at)).into() };
    proxied(
        SocketAddr::new(address(0), port(block, 32)),
        SocketAddr::new(address(16), port(block, 34)),
    )
}

#[inline]
fn port(block: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array(block, at))
}

/// `N` bytes of a block whose length was checked against its family.
#[inline]
fn array<const N: usize>(block: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&block[at..at + N]);
    bytes
}
