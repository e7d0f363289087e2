//! What a packet meets that is between two rules of our table when the table changes.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};

use mmproxyctl::model::Pathway;
use mmproxyctl::pathway::{Firewall, Report};

use crate::pathway::{add, del, pathway};
use crate::support::net::Host;

/// One in fifteen or so lost a packet, while the maps still went with their rules.
const REPLACEMENTS: usize = if cfg!(feature = "soak") { 4000 } else { 80 };

const SENDERS: usize = 2;

/// Leaves every packet to its connection's mark, and counts behind each of our base chains what came and
/// what has no mark there.
const PROBE: &str = r#"
table inet probe {
    chain before {
        type filter hook output priority -160
        ct mark set 0x40000000
        meta mark set 0
    }
    chain sent {
        type filter hook output priority -140
        meta l4proto udp counter comment "all"
        meta l4proto udp meta mark 0 counter comment "lost"
        meta mark set 0
    }
    chain received {
        type filter hook prerouting priority -140
        meta l4proto udp counter comment "all"
        meta l4proto udp meta mark 0 counter comment "lost"
    }
}
"#;

fn masked(mark: u32, mask: u32) -> Pathway {
    let mut pathway = pathway(mark, &[]);
    pathway.mask = format!("{mask:#x}").parse().unwrap();
    pathway
}

/// What a chain of the probe counted: all, and those without a mark.
fn counted(host: &Host, chain: &str) -> [u64; 2] {
    let listed = host.run(&format!("nft list chain inet probe {chain}"));
    ["all", "lost"].map(|name| {
        let mut lines = listed.lines();
        let line = lines.find(|line| line.ends_with(&format!("comment \"{name}\"")));
        let (_, behind) = line.unwrap().split_once("packets ").unwrap();
        behind.split(' ').next().unwrap().parse().unwrap()
    })
}

/// The table's part of a run, to be made again and again.
fn script(host: &Host, name: &str, report: &Report) -> String {
    let commands = report
        .changes
        .iter()
        .map(|change| change.command.to_string());
    let text: Vec<_> = commands.filter(|text| text.starts_with("nft ")).collect();
    assert_eq!(text.len(), 1, "{:#?}", report.changes);
    format!("sh {}", host.write(name, &text[0]).display())
}

#[test]
fn no_packet_is_lost_between_two_rules() {
    let host = Host::new("flood").with(Firewall::Nftables);
    host.ip("link set lo up");
    // the look-ups of other masks come first: they are the time in which the table can change
    let pathways: Vec<_> = (0..14)
        .map(|bit| masked(1 << bit, 1 << bit))
        .chain([masked(0x4000_0000, 0xc000_0000)])
        .collect();
    add(&host, &pathways);
    let probe = host.write("probe", PROBE);
    host.run(&format!("nft -f {}", probe.display()));
    let (receiver, senders) = host.enter(|| {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        let sender = |_| {
            let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
            sender.connect(receiver.local_addr().unwrap()).unwrap();
            sender
        };
        let senders: Vec<_> = (0..SENDERS).map(sender).collect();
        (receiver, senders)
    });
    let neighbour = [masked(0x8000_0000, 0xc000_0000)];
    let comes = script(&host, "comes", &add(&host, &neighbour));
    let goes = script(&host, "goes", &del(&host, &neighbour));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for sender in &senders {
            let done = &done;
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    sender.send(&[0; 64]).unwrap();
                }
            });
        }
        let work = || {
            for _ in 0..REPLACEMENTS / 2 {
                host.run(&comes);
                host.run(&goes);
            }
        };
        // also when the work panics, or the scope waits for ever
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        done.store(true, Ordering::Relaxed);
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    drop(receiver);
    let [sent, received] = ["sent", "received"].map(|chain| counted(&host, chain));
    println!("{REPLACEMENTS} replacements: sent {sent:?}, received {received:?} (all, lost)");
    assert!(
        sent[0] > 1000 && received[0] > 1000,
        "{sent:?} {received:?}"
    );
    assert_eq!([sent[1], received[1]], [0, 0], "of {sent:?} {received:?}");
}
