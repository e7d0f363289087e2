//! Random pieces are deleted one after the other, while connections over four pathways are busy.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::cells::{Lab, accept, exchange};
use super::{listed, watch::repairs};
use crate::support::net::{Host, wait_for};

const MARKS: [u32; 4] = [123, 124, 125, 126];
const CLIENTS: [&str; 2] = ["198.51.100.7", "2001:db8:7::7"];
const SERVICES: [&str; 6] = [
    "127.0.0.1",
    "::1",
    "10.0.0.2",
    "fd00::2",
    "172.20.0.2",
    "fd00:20::2",
];

/// What lists pieces, and what deletes a line of the list.
const LISTS: [(&str, &str); 6] = [
    ("ip rule", "ip rule del priority"),
    ("ip -6 rule", "ip -6 rule del priority"),
    ("ip -4 route show table all", "ip route del"),
    ("ip -6 route show table all", "ip -6 route del"),
    ("iptables -t mangle -S", "iptables -t mangle"),
    ("ip6tables -t mangle -S", "ip6tables -t mangle"),
];

/// A piece as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    list: usize,
    line: String,
}

impl Piece {
    fn all(host: &Host) -> Vec<Self> {
        let of = |list| Self::listed(host, list);
        (0..LISTS.len()).flat_map(of).collect()
    }

    /// Those of ours in one listing.
    fn listed(host: &Host, list: usize) -> Vec<Self> {
        let text = host.run(LISTS[list].0);
        let ours = text
            .lines()
            .filter(|line| line.contains("proto 177") || line.contains("mmproxyctl:"));
        ours.map(|line| Self {
            list,
            // what a line has to remember of its table depends on which lines are there
            line: line.replace(":made-table", "").replace(":made-chain", ""),
        })
        .collect()
    }

    fn delete(&self, host: &Host) {
        let line = host.run(LISTS[self.list].0);
        let same =
            |line: &&str| line.replace(":made-table", "").replace(":made-chain", "") == self.line;
        let line = line.lines().find(same).expect("the piece is there");
        let words = line
            .replace("-A ", "-D ")
            .replace('"', "")
            .replacen(':', "", usize::from(self.list < 2))
            .replace(" pref medium", "");
        host.run(&format!("{} {words}", LISTS[self.list].1));
    }

    fn is_there(&self, host: &Host) -> bool {
        Self::listed(host, self.list).contains(self)
    }
}

/// Numbers without a pattern that matters (xorshift, Marsaglia 2003), the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// The times that the repairs took, sorted.
fn deletions(count: usize) -> Vec<Duration> {
    let lab = Lab::new(mmproxyctl::pathway::Firewall::Auto);
    lab.default_route(true);
    let conf: String = MARKS
        .map(|mark| format!("{mark} targets=10.0.0.2,fd00::2,172.20.0.2,fd00:20::2\n"))
        .concat();
    lab.wks.write("etc/pathways.conf", conf);
    let watch = lab.wks.spawn(lab.wks.mmproxyctl("pathway watch"));
    watch.wait_log("pathways are in place");
    // replies that leave for the client by the default route, whose host is far away and does not answer
    for (iptables, client) in ["iptables", "ip6tables"].into_iter().zip(CLIENTS) {
        lab.lan.run(&format!(
            "{iptables} -t raw -A PREROUTING -d {client} -p tcp -j DROP"
        ));
    }
    let mut connections = Vec::new();
    for mark in MARKS {
        for service in SERVICES {
            let found = lab.services.iter().find(|(name, _)| *name == service);
            let listener = &found.expect("a service").1;
            let client = CLIENTS[usize::from(service.contains(':'))];
            let (near, client) = lab
                .marked(mark, client, service, Duration::from_secs(5))
                .unwrap_or_else(|error| panic!("{mark}: {client} to {service}: {error}"));
            let far = accept(listener, client);
            // longer than the longest retransmission timer can become meanwhile
            for stream in [&near, &far] {
                stream
                    .set_read_timeout(Some(Duration::from_secs(30)))
                    .expect("set a timeout");
            }
            connections.push((format!("{mark}: {client} to {service}"), near, far));
        }
    }

    let pieces = Piece::all(&lab.wks);
    assert_eq!(pieces.len(), 4 * (14 + 2 + 6), "{pieces:#?}");
    let (mut dice, mut times) = (Dice(0x9E37_79B9_7F4A_7C15), Vec::new());
    let done = AtomicBool::new(false);
    let exchanges: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = connections
            .iter_mut()
            .map(|(name, near, far)| {
                let done = &done;
                scope.spawn(move || {
                    let mut exchanges = 0;
                    while !done.load(Ordering::Relaxed) {
                        exchange(near, far).unwrap_or_else(|error| panic!("{name}: {error}"));
                        exchanges += 1;
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    exchanges
                })
            })
            .collect();
        for number in 0..count {
            let piece = &pieces[dice.below(pieces.len())];
            piece.delete(&lab.wks);
            let start = Instant::now();
            while !piece.is_there(&lab.wks) {
                assert!(
                    start.elapsed() < Duration::from_secs(10),
                    "{number}: not put back: {piece:?}\n{}",
                    watch.log()
                );
            }
            times.push(start.elapsed());
        }
        done.store(true, Ordering::Relaxed);
        let count = |thread: std::thread::ScopedJoinHandle<'_, u64>| thread.join().expect("alive");
        threads.into_iter().map(count).sum()
    });
    for (name, near, far) in &mut connections {
        exchange(near, far).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    assert!(exchanges > count as u64, "{exchanges} exchanges");
    assert!(!watch.log().contains("storm"), "{}", watch.log());
    // each once; the last one is counted a moment after it is back
    wait_for("every repair to be counted", || {
        repairs(&lab.wks) >= count as u64
    });
    assert_eq!(repairs(&lab.wks), count as u64, "{}", watch.log());
    times.sort_unstable();
    times
}

fn print(times: &[Duration]) -> (Duration, Duration) {
    let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)];
    println!(
        "{} deletions: repaired after {:?} (median), {:?} (p99), {:?} (longest)",
        times.len(),
        at(50),
        at(99),
        times[times.len() - 1]
    );
    (at(50), at(99))
}

#[test]
fn deletions_under_traffic_are_repaired_and_cost_no_connection() {
    let (median, _) = print(&deletions(60));
    // the other tests run beside this one
    assert!(median < Duration::from_millis(100), "{median:?}");
}

#[cfg(feature = "soak")]
#[test]
fn a_thousand_deletions_under_traffic() {
    let (_, p99) = print(&deletions(1000));
    assert!(p99 < Duration::from_millis(100), "{p99:?}");
}

#[test]
fn a_deleted_piece_is_missed_without_a_watch() {
    // what the test above relies on
    let host = Host::new("unwatched");
    super::add(&host, &[super::pathway(123, &[])]);
    for piece in Piece::all(&host) {
        let before = listed(&host, &[LISTS[piece.list].0]);
        piece.delete(&host);
        assert!(!piece.is_there(&host), "{piece:?}");
        assert_ne!(listed(&host, &[LISTS[piece.list].0]), before);
    }
    assert!(Piece::all(&host).is_empty());
}
