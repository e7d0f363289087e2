//! What holds for any bytes whatsoever. Shared with the fuzz target.

use mmproxyctl::relay::header::{
    Decoded, Endpoints, Header, MAX_V1, MAX_V2, V2, Version, decode, encode_v1, looks_like, tlv,
};

/// All laws at once. Panics when one is broken.
pub(crate) fn assert_all(bytes: &[u8]) {
    let whole = decode(bytes);
    if let Ok(Decoded::Complete { header, length }) = whole {
        assert_complete(bytes, header, length);
    }
    // an outcome is final: what is cut off never makes another one of it
    for cut in 0..bytes.len() {
        let part = decode(&bytes[..cut]);
        let fits = match (part, whole) {
            (Ok(Decoded::Incomplete), Ok(Decoded::Complete { length, .. })) => cut < length,
            (Ok(Decoded::Incomplete), _) => true,
            (part, whole) => part == whole,
        };
        assert!(
            fits,
            "{}: {part:?} after {cut} bytes, {whole:?} in the end",
            bytes.escape_ascii()
        );
    }
    if looks_like(bytes).is_some() {
        assert!(
            whole.is_err(),
            "{}: {whole:?} and a hint",
            bytes.escape_ascii()
        );
    }
}

fn assert_complete(bytes: &[u8], header: Header<'_>, length: usize) {
    let limit = match header.version {
        Version::V1 => MAX_V1,
        Version::V2 => MAX_V2,
    };
    assert!(length <= limit.min(bytes.len()), "{length} bytes");

    if let Some(value) = header.tlvs.get(tlv::CRC32C) {
        let value_at = length - as_offset_from_end(&bytes[..length], value);
        let mut zeroed = bytes[..length].to_vec();
        zeroed[value_at..value_at + 4].fill(0);
        assert_eq!(
            value,
            crc32c(&zeroed).to_be_bytes(),
            "an accepted checksum is right"
        );
    }
    if let Endpoints::Proxied {
        client,
        destination,
    } = header.endpoints
    {
        // what was understood, written anew, is understood the same way
        let again = match header.version {
            Version::V1 => encode_v1(client.get(), destination),
            Version::V2 => {
                let start = V2::proxied(client.get(), destination, header.transport);
                let copied = header.tlvs.iter().filter(|(kind, _)| *kind != tlv::CRC32C);
                let copy = copied.fold(start, |copy, (kind, value)| {
                    copy.tlv(kind, value).expect("it fitted before")
                });
                match header.tlvs.get(tlv::CRC32C) {
                    Some(_) => copy.finish_with_crc32c().expect("it fitted before"),
                    None => copy.finish(),
                }
            }
        };
        let Ok(Decoded::Complete {
            header: read_back, ..
        }) = decode(&again)
        else {
            // an address that was not mapped before may be now, which takes 24 bytes more
            assert!(again.len() > limit, "{}", again.escape_ascii());
            return;
        };
        assert_eq!(read_back.endpoints, header.endpoints);
        assert_eq!(read_back.transport, header.transport);
        assert_eq!(read_back.tlvs.iter().count(), header.tlvs.iter().count());
    }
}

/// How far in front of the end of `all` its part `part` begins.
fn as_offset_from_end(all: &[u8], part: &[u8]) -> usize {
    all.as_ptr_range().end as usize - part.as_ptr() as usize
}

/// CRC32C bit by bit, so that no check leans on the decoder's own.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 }
        })
    })
}
