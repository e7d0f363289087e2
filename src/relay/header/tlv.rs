//! The extensions of a v2 header: type (1 byte), length (2), value; walked once, checksum verified.

use super::HeaderError;

/// The protocol that the client negotiated (ALPN).
pub const ALPN: u8 = 0x01;
/// The host name that the client asked for.
pub const AUTHORITY: u8 = 0x02;
/// The checksum of the whole header.
pub const CRC32C: u8 = 0x03;
/// Padding.
pub const NOOP: u8 = 0x04;
/// An identifier of the connection, chosen by the sender.
pub const UNIQUE_ID: u8 = 0x05;
/// What is known about the client's TLS; holds further TLVs.
pub const SSL: u8 = 0x20;
/// The name of a network namespace.
pub const NETNS: u8 = 0x30;

/// The longest unique id in bytes.
pub const MAX_UNIQUE_ID: usize = 128;

/// Type and length.
const PREFIX: usize = 3;

/// The TLVs of a header, in their order, each known to be whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tlvs<'a>(&'a [u8]);

impl<'a> Tlvs<'a> {
    /// Each type and value.
    pub fn iter(self) -> Iter<'a> {
        Iter(self.0)
    }

    /// The first value of a type.
    pub fn get(self, kind: u8) -> Option<&'a [u8]> {
        self.iter()
            .find_map(|(found, value)| (found == kind).then_some(value))
    }

    /// The sender's identifier of the connection: opaque, at most [`MAX_UNIQUE_ID`] bytes.
    pub fn unique_id(self) -> Option<&'a [u8]> {
        self.get(UNIQUE_ID)
    }

    /// The host name that the client asked for; none when it is not UTF-8, as it has to be.
    pub fn authority(self) -> Option<&'a str> {
        std::str::from_utf8(self.get(AUTHORITY)?).ok()
    }
}

impl<'a> IntoIterator for Tlvs<'a> {
    type Item = (u8, &'a [u8]);
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}

/// Walks [`Tlvs`].
#[derive(Debug, Clone)]
pub struct Iter<'a>(&'a [u8]);

impl<'a> Iterator for Iter<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (kind, value, rest) = split(self.0)?;
        self.0 = rest;
        Some((kind, value))
    }
}

/// The first TLV and what follows it, unless it is cut short.
#[inline]
fn split(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[kind, high, low], rest) = bytes.split_first_chunk::<PREFIX>()?;
    let (value, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes([high, low])))?;
    Some((kind, value, rest))
}

/// Walks what stands from `at` to the end of a whole header, and verifies its checksum if it has one.
pub(super) fn validate(header: &[u8], at: usize) -> Result<Tlvs<'_>, HeaderError> {
    let tlvs = &header[at..];
    let mut rest = tlvs;
    let mut checksum = None;
    while !rest.is_empty() {
        let value_at = header.len() - rest.len() + PREFIX;
        let (kind, value, behind) = split(rest).ok_or(HeaderError::TlvTruncated)?;
        rest = behind;
        // the length was read from two bytes
        let length = value.len() as u16;
        match kind {
            CRC32C => {
                let announced = value
                    .try_into()
                    .map_err(|_| HeaderError::ChecksumLength(length))?;
                if checksum.replace((value_at, announced)).is_some() {
                    return Err(HeaderError::ChecksumTwice);
                }
            }
            UNIQUE_ID if value.len() > MAX_UNIQUE_ID => {
                return Err(HeaderError::UniqueIdLength(length));
            }
            _ => {}
        }
    }
    if let Some((value_at, announced)) = checksum {
        let announced = u32::from_be_bytes(announced);
        let computed = checksum_of(header, value_at);
        if announced != computed {
            return Err(HeaderError::ChecksumMismatch {
                announced,
                computed,
            });
        }
    }
    Ok(Tlvs(tlvs))
}

/// The CRC32C of a header, the four bytes from `value_at` on taken as zero.
pub(super) fn checksum_of(header: &[u8], value_at: usize) -> u32 {
    let before = crc32c::crc32c(&header[..value_at]);
    let zeroed = crc32c::crc32c_append(before, &[0; 4]);
    crc32c::crc32c_append(zeroed, &header[value_at + 4..])
}
