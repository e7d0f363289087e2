//! What iptables-nft leaves behind: its base chains, and the table that holds them. And whether our own
//! table is there.
//!
//! It makes table and chain on the first line, and deletes neither with the last one. Owns the few
//! nf_tables messages that tell whether they were there before, and delete them when they are empty.
//! The kernel itself decides "empty" (`NLM_F_NONREC`), so another program's line is never taken along,
//! whenever it came.

use std::io;

use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_NONREC, NLM_F_REQUEST};
use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{Socket, SocketAddr};

use crate::model::Family;
use crate::pathway::piece::Chain;

use super::ruleset::Absent;

/// `NFNL_SUBSYS_NFTABLES`, in the upper byte of a message's type.
const NFTABLES: u16 = 10;
/// `NFNL_MSG_BATCH_BEGIN` and `NFNL_MSG_BATCH_END`.
const BATCH: (u16, u16) = (0x10, 0x11);
/// `NLMSG_ERROR`, which is also the acknowledgement.
const ERROR: u16 = 2;
/// `NFT_MSG_GETTABLE`, `NFT_MSG_DELTABLE`, `NFT_MSG_GETCHAIN`, `NFT_MSG_DELCHAIN`.
const GET_TABLE: u16 = 1;
const DEL_TABLE: u16 = 2;
const GET_CHAIN: u16 = 4;
const DEL_CHAIN: u16 = 5;
/// `NFTA_TABLE_NAME` and `NFTA_CHAIN_TABLE` have the same number.
const TABLE_NAME: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_POLICY: u16 = 5;
const TABLE: &str = "mangle";
/// `NF_ACCEPT`.
const ACCEPT: u32 = 1;
const HEADER: usize = 16;
const NFGEN: usize = 4;

/// Which of the mangle table's parts the next line would make.
pub(super) fn absent(family: Family) -> io::Result<Absent> {
    let mut absent = Absent::default();
    if get(family, GET_TABLE, &[(TABLE_NAME, TABLE)])?.is_none() {
        absent.table = true;
        absent.chains.extend(Chain::ALL);
        return Ok(absent);
    }
    for chain in Chain::ALL {
        if get(family, GET_CHAIN, &chain_attributes(chain))?.is_none() {
            absent.chains.insert(chain);
        }
    }
    Ok(absent)
}

/// Whether there is a `table inet mmproxy`, whosever.
pub(super) fn own_table_exists() -> io::Result<bool> {
    let (_, name) = super::table::NAME;
    let found = get_of(NFPROTO_INET, GET_TABLE, &[(TABLE_NAME, name)])?;
    Ok(found.is_some())
}

/// Deletes a chain of the mangle table if it is empty and accepts. Whether it did.
pub(super) fn drop_chain(family: Family, chain: Chain) -> io::Result<bool> {
    let Some(found) = get(family, GET_CHAIN, &chain_attributes(chain))? else {
        return Ok(false);
    };
    let policy = attribute(&found, CHAIN_POLICY).and_then(|value| value.try_into().ok());
    if policy.map(u32::from_be_bytes) != Some(ACCEPT) {
        return Ok(false);
    }
    delete(family, DEL_CHAIN, &chain_attributes(chain))
}

/// Deletes the mangle table if it is empty. Whether it did.
pub(super) fn drop_table(family: Family) -> io::Result<bool> {
    delete(family, DEL_TABLE, &[(TABLE_NAME, TABLE)])
}

fn chain_attributes(chain: Chain) -> [(u16, &'static str); 2] {
    [(TABLE_NAME, TABLE), (CHAIN_NAME, chain.name())]
}

/// `NFPROTO_INET`: both families.
const NFPROTO_INET: u8 = 1;

fn nfproto(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

/// One message: netlink header, nfgenmsg, string attributes.
fn message(kind: u16, flags: u16, head: [u8; NFGEN], attributes: &[(u16, &str)]) -> Vec<u8> {
    let mut body = head.to_vec();
    for (number, text) in attributes {
        let length = 4 + text.len() + 1;
        body.extend(u16::try_from(length).unwrap_or(u16::MAX).to_ne_bytes());
        body.extend(number.to_ne_bytes());
        body.extend(text.as_bytes());
        body.resize(body.len() + 1, 0);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    let mut out = u32::try_from(HEADER + body.len())
        .unwrap_or(u32::MAX)
        .to_ne_bytes()
        .to_vec();
    out.extend(kind.to_ne_bytes());
    out.extend((flags | NLM_F_REQUEST).to_ne_bytes());
    out.extend([0; 8]);
    out.extend(body);
    out
}

/// Sends, and returns the answers that are not empty acknowledgements; the kernel has queued them all
/// when `send` returns.
fn exchange(request: &[u8]) -> io::Result<Vec<Vec<u8>>> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.send_to(request, &SocketAddr::new(0, 0), 0)?;
    let mut answers = Vec::new();
    loop {
        let mut buffer = Vec::with_capacity(8192);
        match socket.recv(&mut buffer, libc::MSG_DONTWAIT) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(answers),
            Err(error) => return Err(error),
        }
        let mut rest = buffer.as_slice();
        while rest.len() >= HEADER {
            let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
            if length < HEADER || length > rest.len() {
                break;
            }
            let (one, after) = rest.split_at(length);
            rest = &after[(length.next_multiple_of(4) - length).min(after.len())..];
            if u16::from_ne_bytes([one[4], one[5]]) != ERROR {
                answers.push(one[HEADER..].to_vec());
                continue;
            }
            let code = one
                .get(HEADER..HEADER + 4)
                .and_then(|code| code.try_into().ok())
                .map_or(0, i32::from_ne_bytes);
            if code != 0 {
                return Err(io::Error::from_raw_os_error(code.saturating_abs()));
            }
        }
    }
}

/// The object's attributes, or `None` where it, or nf_tables as a whole, is not there.
fn get(family: Family, kind: u16, attributes: &[(u16, &str)]) -> io::Result<Option<Vec<u8>>> {
    get_of(nfproto(family), kind, attributes)
}

fn get_of(nfproto: u8, kind: u16, attributes: &[(u16, &str)]) -> io::Result<Option<Vec<u8>>> {
    let head = [nfproto, 0, 0, 0];
    let request = message(NFTABLES << 8 | kind, 0, head, attributes);
    match exchange(&request) {
        Ok(answers) => Ok(answers
            .into_iter()
            .next()
            .map(|answer| answer.get(NFGEN..).unwrap_or_default().to_vec())),
        // EINVAL: no nf_tables in this kernel; EPROTONOSUPPORT: no netfilter netlink
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::EINVAL | libc::EPROTONOSUPPORT)
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Deletes the object if it is empty. Not empty and not there are both "did not".
fn delete(family: Family, kind: u16, attributes: &[(u16, &str)]) -> io::Result<bool> {
    let subsystem = NFTABLES.to_be_bytes();
    let batch = [0, 0, subsystem[0], subsystem[1]];
    let mut request = message(BATCH.0, 0, batch, &[]);
    let head = [nfproto(family), 0, 0, 0];
    request.extend(message(
        NFTABLES << 8 | kind,
        NLM_F_ACK | NLM_F_NONREC,
        head,
        attributes,
    ));
    request.extend(message(BATCH.1, 0, batch, &[]));
    match exchange(&request) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENOENT)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The value of an attribute.
fn attribute(mut attributes: &[u8], number: u16) -> Option<&[u8]> {
    while let [a, b, c, d, ..] = *attributes {
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = attributes.get(4..length)?;
        // the two upper bits are flags
        if u16::from_ne_bytes([c, d]) & 0x3fff == number {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}
