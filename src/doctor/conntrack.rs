//! What connection tracking remembers of one connection: a single question to ctnetlink, which answers
//! also where the kernel has no `/proc/net/nf_conntrack`.

use std::io;
use std::net::{IpAddr, SocketAddr};

use rtnetlink::packet_core::NLM_F_REQUEST;
use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{Socket, SocketAddr as NetlinkAddr};

use super::evidence::Entry;

/// `NFNL_SUBSYS_CTNETLINK` and `IPCTNL_MSG_CT_GET`.
const GET: u16 = 1 << 8 | 1;
const ERROR: u16 = 2;
const NESTED: u16 = 1 << 15;
const TUPLE_ORIGINAL: u16 = 1;
const STATUS: u16 = 3;
const PROTOCOL_INFO: u16 = 4;
const MARK: u16 = 8;
/// `IPS_SEEN_REPLY`.
const SEEN_REPLY: u32 = 2;
/// A netlink header and nfgenmsg.
const HEADERS: usize = 20;

/// Names of `enum tcp_conntrack`.
const STATES: [&str; 10] = [
    "NONE",
    "SYN_SENT",
    "SYN_RECV",
    "ESTABLISHED",
    "FIN_WAIT",
    "CLOSE_WAIT",
    "LAST_ACK",
    "TIME_WAIT",
    "CLOSE",
    "SYN_SENT2",
];

fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + payload.len()).unwrap_or(u16::MAX);
    let mut out = length.to_ne_bytes().to_vec();
    out.extend(kind.to_ne_bytes());
    out.extend(payload);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

fn tuple(protocol: u8, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let (source, destination) = if from.is_ipv4() { (1, 2) } else { (3, 4) };
    let ends = [
        attribute(source, &octets(from.ip())),
        attribute(destination, &octets(to.ip())),
    ];
    let ports = [
        attribute(1, &[protocol]),
        attribute(2, &from.port().to_be_bytes()),
        attribute(3, &to.port().to_be_bytes()),
    ];
    let both = [
        attribute(1 | NESTED, &ends.concat()),
        attribute(2 | NESTED, &ports.concat()),
    ];
    attribute(TUPLE_ORIGINAL | NESTED, &both.concat())
}

/// Attributes of a message or of a nest.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let payload = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & !NESTED, payload))
    })
}

fn number(bytes: &[u8]) -> u32 {
    bytes.try_into().map_or(0, u32::from_be_bytes)
}

/// Asks for the connection that this socket began. Needs CAP_NET_ADMIN.
///
/// # Errors
/// When the kernel has no ctnetlink, or refuses.
pub(super) fn entry(protocol: u8, from: SocketAddr, to: SocketAddr) -> io::Result<Entry> {
    let family = if from.is_ipv4() { 2 } else { 10 };
    let mut body = vec![family, 0, 0, 0];
    body.extend(tuple(protocol, from, to));
    let length = u32::try_from(HEADERS - 4 + body.len()).unwrap_or(u32::MAX);
    let mut request = length.to_ne_bytes().to_vec();
    request.extend(GET.to_ne_bytes());
    request.extend(NLM_F_REQUEST.to_ne_bytes());
    request.extend([0; 8]);
    request.extend(body);

    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.send_to(&request, &NetlinkAddr::new(0, 0), 0)?;
    let mut answer = Vec::with_capacity(8192);
    // the kernel has queued its answer when the request is sent
    socket.recv(&mut answer, libc::MSG_DONTWAIT)?;
    read(&answer)
}

fn read(answer: &[u8]) -> io::Result<Entry> {
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok());
    if kind.map(u16::from_ne_bytes) == Some(ERROR) {
        let code = answer.get(16..20).and_then(|bytes| bytes.try_into().ok());
        return match code.map_or(0, i32::from_ne_bytes).saturating_abs() {
            libc::ENOENT => Ok(Entry::Absent),
            code => Err(io::Error::from_raw_os_error(code)),
        };
    }
    let (mut mark, mut state, mut replied) = (0, String::new(), false);
    for (kind, payload) in attributes(answer.get(HEADERS..).unwrap_or_default()) {
        match kind {
            MARK => mark = number(payload),
            STATUS => replied = number(payload) & SEEN_REPLY != 0,
            PROTOCOL_INFO => {
                let tcp = attributes(payload).find(|(kind, _)| *kind == 1);
                let value = tcp.and_then(|(_, tcp)| attributes(tcp).find(|(kind, _)| *kind == 1));
                let name = value.and_then(|(_, value)| STATES.get(usize::from(*value.first()?)));
                state = name.copied().unwrap_or_default().to_owned();
            }
            _ => {}
        }
    }
    Ok(Entry::Seen {
        mark,
        state,
        replied,
    })
}
