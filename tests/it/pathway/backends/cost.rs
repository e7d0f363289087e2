//! What pathways cost everybody's packets, and what a run costs, by back end and number of pathways.

use std::net::UdpSocket;
use std::time::Duration;

use mmproxyctl::pathway::Firewall;
use nix::time::{ClockId, clock_gettime};

use crate::pathway::{add, pathway};
use crate::support::net::Host;

const PACKETS: u32 = 10_000;
const ROUNDS: usize = 5;

/// The processor's time for one datagram through OUTPUT and PREROUTING, which nobody reads.
fn per_packet(host: &Host) -> Duration {
    host.enter(|| {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.connect(receiver.local_addr().unwrap()).unwrap();
        // the sending thread does all the work of a packet over lo: its own clock is not the machine's load
        let now = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
        let rounds = (0..ROUNDS).map(|_| {
            let start = now();
            for _ in 0..PACKETS {
                sender.send(&[0; 64]).unwrap();
            }
            (now() - start) / PACKETS
        });
        rounds.min().unwrap()
    })
}

#[test]
fn two_hundred_pathways_cost_a_packet_what_one_does() {
    let cost = |firewall: Firewall, pathways: u32| {
        let host = Host::new("cost").with(firewall);
        let wanted: Vec<_> = (1..=pathways).map(|mark| pathway(mark, &[])).collect();
        if !wanted.is_empty() {
            add(&host, &wanted);
        }
        per_packet(&host)
    };
    let nothing = cost(Firewall::Nftables, 0);
    let [nft_1, nft_200] = [1, 200].map(|count| cost(Firewall::Nftables, count));
    let [iptables_1, iptables_200] = [1, 200].map(|count| cost(Firewall::Iptables, count));
    let table = format!(
        "processor time per packet over lo: no pathway {nothing:?} · nftables, 1 pathway {nft_1:?}, \
         200 {nft_200:?} · iptables, 1 {iptables_1:?}, 200 {iptables_200:?}"
    );
    println!("{table}");
    assert!(nft_200 < nft_1.mul_f64(1.3), "{table}");
    assert!(nft_200 < iptables_200, "{table}");
}

#[cfg(feature = "soak")]
#[test]
fn runs_with_256_pathways() {
    use std::time::Instant;

    use crate::pathway::ctl;

    for firewall in [Firewall::Nftables, Firewall::Iptables] {
        let host = Host::new("many").with(firewall);
        // marks of two masks
        let lines: String = (1..=256)
            .map(|mark| format!("{mark} table={}\n", 1000 + mark))
            .collect();
        host.write("etc/pathways.conf", lines);
        let timed = |words: &str| {
            let start = Instant::now();
            let (code, _, err) = ctl(&host, words);
            assert_eq!(code, 0, "{words}: {err}");
            start.elapsed()
        };
        let added = timed("pathway add --all");
        let unchanged = (0..5).map(|_| timed("pathway add --all")).min().unwrap();
        let checked = (0..5).map(|_| timed("pathway check")).min().unwrap();
        let removed = timed("pathway del --all");
        let table = format!(
            "256 pathways, {firewall:?}: add {added:?}, add again {unchanged:?}, check {checked:?}, \
             del {removed:?}"
        );
        println!("{table}");
        assert!(added < Duration::from_secs(1), "{table}");
        assert!(unchanged < Duration::from_millis(100), "{table}");
        assert!(host.run("ip rule").lines().count() == 3, "{table}");
    }
}
