//! What takes minutes: `./tests/run.sh --soak`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::chain::deployment::{CLIENT, Deployment, ROUTER01, VPS01};
use crate::support::net::{Running, wait_for};

const FOR: Duration = Duration::from_secs(180);

/// One HTTP request; the server answers the address and port that it sees.
fn fetch(address: SocketAddr) -> (SocketAddr, String) {
    let mut stream = TcpStream::connect(address).expect("connect");
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .expect("set a timeout");
    let own = stream.local_addr().expect("own address");
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: wks01\r\nConnection: close\r\n\r\n")
        .expect("write");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read");
    (own, answer)
}

fn descriptors(relay: &Running) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", relay.pid()))
        .expect("its descriptors")
        .count()
}

/// Resident memory in kB.
fn resident(relay: &Running) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", relay.pid())).expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let word = line.and_then(|line| line.split_whitespace().next());
    word.and_then(|word| word.parse().ok()).expect("VmRSS")
}

#[test]
fn minutes_of_short_connections_beside_open_sessions() {
    let lab = Deployment::new();
    let (sshd, _web) = (lab.sshd(), lab.web_server());
    let relays = lab.mmproxyctl(&[
        ("vps01-web", 8443),
        ("vps01-ssh", 2222),
        ("router01-ssh", 2223),
    ]);
    let _proxies = lab.haproxies();
    let mut sessions: Vec<_> = [VPS01, ROUTER01]
        .into_iter()
        .flatten()
        .map(|address| sshd.login(&lab.client, address, 22001, None))
        .collect();
    // past the first connections, which make buffers and pipes that stay
    for (port, address) in (45000..).zip(VPS01) {
        lab.fetch(address, port);
    }
    let before = (descriptors(&relays[0]), resident(&relays[0]));

    let end = Instant::now() + FOR;
    let done = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for (client, address) in CLIENT.into_iter().zip(VPS01) {
            let (lab, done) = (&lab, &done);
            scope.spawn(move || {
                lab.client.enter(|| {
                    let address = SocketAddr::new(address.parse().expect("an address"), 443);
                    while Instant::now() < end {
                        let (own, answer) = fetch(address);
                        let body = answer.rsplit("\r\n").next().unwrap_or_default();
                        // the port may be a fresh one: the client's own comes round again within
                        // the TIME_WAIT of its last use
                        assert_eq!(body.split(' ').next(), Some(client), "{own}: {answer}");
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                });
            });
        }
        while Instant::now() < end {
            for session in &mut sessions {
                session.echo("still here");
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    });
    sessions.into_iter().for_each(|session| session.close());

    let done = done.into_inner();
    println!("{done} connections in {FOR:?}");
    assert!(done > 10_000, "only {done} connections");
    wait_for("its descriptors to be closed", || {
        descriptors(&relays[0]) <= before.0
    });
    let grown = resident(&relays[0]).saturating_sub(before.1);
    assert!(grown < 4096, "resident memory grew by {grown} kB");
}
