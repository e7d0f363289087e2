//! Version 1: one line of text, read once from left to right.
//!
//! By hand rather than through `str::parse`: a byte that cannot be right is refused when it arrives, not
//! when the line ends, and the form is stricter than that of `std` (`+80` is a port there).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{
    Decoded, Endpoints, Header, HeaderError, MAX_V1, Side, Tlvs, Transport, Version, proxied,
};

/// Why reading stopped before the end of the line.
enum Stop {
    /// The bytes end here.
    End,
    /// They are wrong here.
    Bad(HeaderError),
}

type Read<T> = Result<T, Stop>;

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// Reads a v1 header.
pub(super) fn decode(bytes: &[u8]) -> Result<Decoded<'_>, HeaderError> {
    let mut cursor = Cursor {
        bytes: &bytes[..bytes.len().min(MAX_V1)],
        at: 0,
    };
    match cursor.line() {
        Ok((endpoints, transport)) => Ok(Decoded::Complete {
            header: Header {
                version: Version::V1,
                endpoints,
                transport,
                tlvs: Tlvs::default(),
            },
            length: cursor.at,
        }),
        Err(Stop::End) if bytes.len() < MAX_V1 => Ok(Decoded::Incomplete),
        Err(Stop::End) => Err(HeaderError::V1TooLong),
        Err(Stop::Bad(error)) => Err(error),
    }
}

impl Cursor<'_> {
    fn line(&mut self) -> Read<(Endpoints, Transport)> {
        self.word(b"PROXY ", HeaderError::NotProxy)?;
        if self.peek()? == b'U' {
            return self.unknown();
        }
        self.word(b"TCP", HeaderError::V1Protocol)?;
        let family = self.peek()?;
        if !matches!(family, b'4' | b'6') {
            return Err(Stop::Bad(HeaderError::V1Protocol));
        }
        self.at += 1;
        self.word(b" ", HeaderError::V1Protocol)?;
        let (client, destination): (IpAddr, IpAddr) = if family == b'4' {
            (
                self.ipv4(HeaderError::V1Ipv4(Side::Client))?.into(),
                self.ipv4(HeaderError::V1Ipv4(Side::Destination))?.into(),
            )
        } else {
            (
                self.ipv6(HeaderError::V1Ipv6(Side::Client))?.into(),
                self.ipv6(HeaderError::V1Ipv6(Side::Destination))?.into(),
            )
        };
        let client_port = self.port(HeaderError::V1Port(Side::Client))?;
        self.word(b" ", HeaderError::V1Port(Side::Client))?;
        let destination_port = self.port(HeaderError::V1Port(Side::Destination))?;
        self.word(b"\r\n", HeaderError::V1End)?;
        Ok((
            proxied(
                SocketAddr::new(client, client_port),
                SocketAddr::new(destination, destination_port),
            ),
            Transport::Stream,
        ))
    }

    /// `UNKNOWN`, and whatever stands between it and the CRLF.
    fn unknown(&mut self) -> Read<(Endpoints, Transport)> {
        self.word(b"UNKNOWN", HeaderError::V1Protocol)?;
        match self.peek()? {
            b'\r' => self.word(b"\r\n", HeaderError::V1End)?,
            b' ' => {
                let rest = &self.bytes[self.at..];
                let end = rest.windows(2).position(|pair| pair == b"\r\n");
                self.at += end.ok_or(Stop::End)? + 2;
            }
            _ => return Err(Stop::Bad(HeaderError::V1Protocol)),
        }
        Ok((Endpoints::Local, Transport::Unspecified))
    }

    #[inline]
    fn peek(&self) -> Read<u8> {
        self.bytes.get(self.at).copied().ok_or(Stop::End)
    }

    #[inline]
    fn word(&mut self, word: &[u8], error: HeaderError) -> Read<()> {
        for &byte in word {
            if self.peek()? != byte {
                return Err(Stop::Bad(error));
            }
            self.at += 1;
        }
        Ok(())
    }

    /// A decimal number up to `max` without sign or leading zero; stops at the first other byte.
    #[inline]
    fn number(&mut self, max: u32, error: HeaderError) -> Read<u32> {
        let digit = |byte: u8| u32::from(byte.wrapping_sub(b'0'));
        let mut value = digit(self.peek()?);
        if value > 9 {
            return Err(Stop::Bad(error));
        }
        self.at += 1;
        loop {
            let next = digit(self.peek()?);
            if next > 9 {
                return Ok(value);
            }
            if value == 0 || value * 10 + next > max {
                return Err(Stop::Bad(error));
            }
            value = value * 10 + next;
            self.at += 1;
        }
    }

    #[inline]
    fn port(&mut self, error: HeaderError) -> Read<u16> {
        let port = self.number(u32::from(u16::MAX), error)?;
        u16::try_from(port).map_err(|_| Stop::Bad(error))
    }

    /// `a.b.c.d` and a space.
    #[inline]
    fn ipv4(&mut self, error: HeaderError) -> Read<Ipv4Addr> {
        let mut bits = 0;
        for separator in [b".", b".", b".", b" "] {
            bits = bits << 8 | self.number(255, error)?;
            self.word(separator, error)?;
        }
        Ok(Ipv4Addr::from_bits(bits))
    }

    /// An IPv6 address in any of its forms and a space.
    fn ipv6(&mut self, error: HeaderError) -> Read<Ipv6Addr> {
        let bad = Stop::Bad(error);
        let mut groups = [0u16; 8];
        let mut count = 0;
        // where `::` stands, which takes the place of at least one group
        let mut gap = None;
        if self.peek()? == b':' {
            self.word(b"::", error)?;
            gap = Some(0);
        }
        while !(gap == Some(count) && self.peek()? == b' ') {
            let room = if gap.is_some() { 7 } else { 8 } - count;
            if room == 0 {
                return Err(bad);
            }
            let start = self.at;
            let group = self.group(error)?;
            if self.peek()? == b'.' && room >= 2 {
                self.at = start;
                let [a, b, c, d] = self.ipv4(error)?.octets();
                groups[count] = u16::from_be_bytes([a, b]);
                groups[count + 1] = u16::from_be_bytes([c, d]);
                count += 2;
                // the dotted part has read the space
                self.at -= 1;
                break;
            }
            groups[count] = group;
            count += 1;
            match self.peek()? {
                b' ' => break,
                b':' => self.at += 1,
                _ => return Err(bad),
            }
            if self.peek()? == b':' {
                if gap.is_some() || count == 8 {
                    return Err(bad);
                }
                gap = Some(count);
                self.at += 1;
            }
        }
        match gap {
            None if count < 8 => return Err(bad),
            None => {}
            Some(gap) => groups[gap..].rotate_right(8 - count),
        }
        self.word(b" ", error)?;
        Ok(Ipv6Addr::from(groups))
    }

    /// One to four hexadecimal digits; stops at the first other byte.
    #[inline]
    fn group(&mut self, error: HeaderError) -> Read<u16> {
        let mut value = 0;
        for digits in 0..5 {
            let digit = HEX[usize::from(self.peek()?)];
            if digit == NO_DIGIT {
                if digits == 0 {
                    break;
                }
                return Ok(value);
            }
            // a fifth digit is read, and ends the loop
            value = value << 4 | u16::from(digit);
            self.at += 1;
        }
        Err(Stop::Bad(error))
    }
}

const NO_DIGIT: u8 = 0xff;

/// What each byte is worth as a hexadecimal digit: a look-up has no branches to be mispredicted.
const HEX: [u8; 256] = {
    let mut table = [NO_DIGIT; 256];
    let mut value = 0;
    while value < 16 {
        table[b"0123456789abcdef"[value] as usize] = value as u8;
        table[b"0123456789ABCDEF"[value] as usize] = value as u8;
        value += 1;
    }
    table
};
