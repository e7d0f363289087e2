//! Who listens where in this network namespace, and which process that is.
//!
//! Owns: the tables under `/proc/thread-self/net`, and the way from a socket's inode to its process. Must
//! not know: which ports are of interest.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::evidence::{Listener, Ports, Process};
use crate::model::Protocol;

/// `TCP_LISTEN` in the state column.
const LISTEN: &str = "0A";

/// One line of a table.
struct Row {
    local: SocketAddr,
    listens: bool,
    inode: u64,
}

/// `address:port`, hexadecimal words in the machine's byte order.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| {
        let digits = address.get(8 * at..8 * at + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    let ip: IpAddr = if address.len() == 8 {
        Ipv4Addr::from(word(0)?).into()
    } else {
        let mut octets = [0; 16];
        for (at, four) in octets.chunks_exact_mut(4).enumerate() {
            four.copy_from_slice(&word(at)?);
        }
        Ipv6Addr::from(octets).into()
    };
    Some(SocketAddr::new(ip, port))
}

fn row(line: &str) -> Option<Row> {
    let mut words = line.split_whitespace();
    let local = address(words.nth(1)?)?;
    let listens = words.nth(1)? == LISTEN;
    let inode = words.nth(5)?.parse().ok()?;
    Some(Row {
        local,
        listens,
        inode,
    })
}

/// The rows of both families' tables while `wanted` says so. Blocking.
fn rows(protocol: Protocol, mut wanted: impl FnMut(Row) -> bool) -> io::Result<()> {
    for family in ["", "6"] {
        // not /proc/net, which shows the namespace of the process' first thread
        let path = format!("/proc/thread-self/net/{protocol}{family}");
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => file?,
        };
        for line in BufReader::new(file).lines().skip(1) {
            if let Some(row) = row(&line?)
                && !wanted(row)
            {
                break;
            }
        }
    }
    Ok(())
}

/// The sockets of a protocol that others can connect or send to, each with its inode.
///
/// # Errors
/// When the tables cannot be read.
pub fn listening(protocol: Protocol) -> io::Result<Vec<(SocketAddr, u64)>> {
    let mut found = Vec::new();
    rows(protocol, |row| {
        // listeners come first: a host with 100,000 connections is not read to the end
        let wanted = protocol == Protocol::Udp || row.listens;
        if wanted {
            found.push((row.local, row.inode));
        }
        wanted
    })?;
    Ok(found)
}

/// How much of the host's own range of ports is taken, and by whom; `own` tells this host's addresses.
///
/// # Errors
/// When the tables cannot be read.
pub fn ports(range: (u16, u16), own: impl Fn(IpAddr) -> bool) -> io::Result<Ports> {
    let mut ports = HashMap::new();
    let mut known = HashMap::new();
    rows(Protocol::Tcp, |row| {
        let port = row.local.port();
        if !row.listens && (range.0..=range.1).contains(&port) {
            let ip = row.local.ip().to_canonical();
            let foreign = !*known.entry(ip).or_insert_with(|| own(ip));
            *ports.entry(port).or_insert(false) |= foreign;
        }
        true
    })?;
    let count = |some: usize| u32::try_from(some).unwrap_or(u32::MAX);
    Ok(Ports {
        range,
        taken: count(ports.len()),
        spoofed: count(ports.values().filter(|foreign| **foreign).count()),
    })
}

/// The listeners with the processes that hold them, where `/proc` shows them.
pub fn with_processes(sockets: &[(SocketAddr, u64)]) -> Vec<Listener> {
    let owners = owners(sockets);
    sockets
        .iter()
        .map(|(address, inode)| Listener {
            address: *address,
            process: owners.get(inode).cloned(),
        })
        .collect()
}

/// Looks through the descriptors of every process until all inodes are found.
fn owners(sockets: &[(SocketAddr, u64)]) -> HashMap<u64, Process> {
    let mut wanted: HashMap<String, u64> = sockets
        .iter()
        .map(|(_, inode)| (format!("socket:[{inode}]"), *inode))
        .collect();
    let mut owners = HashMap::new();
    let Ok(processes) = fs::read_dir("/proc") else {
        return owners;
    };
    for entry in processes.flatten() {
        if wanted.is_empty() {
            break;
        }
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        // another user's process does not show its descriptors: nothing is known of it then
        let descriptors = fs::read_dir(entry.path().join("fd")).into_iter().flatten();
        for link in descriptors
            .flatten()
            .filter_map(|fd| fs::read_link(fd.path()).ok())
        {
            if let Some(inode) = link.to_str().and_then(|link| wanted.remove(link)) {
                owners.insert(inode, process(pid));
            }
        }
    }
    owners
}

fn process(pid: u32) -> Process {
    let read = |name| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let line = read("cmdline");
    let arguments: Vec<String> = line
        .split(|byte| *byte == 0)
        .filter(|word| !word.is_empty())
        .map(text)
        .collect();
    // the kernel cuts its own name for a process after 15 bytes
    let called = arguments.first().and_then(|path| path.rsplit('/').next());
    Process {
        pid,
        name: called.map_or_else(|| text(&read("comm")).trim().to_owned(), str::to_owned),
        arguments,
    }
}
