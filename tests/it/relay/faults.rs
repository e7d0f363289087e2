//! What goes wrong around a relay under load: nothing corrupt, nothing stuck, nothing leaked.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::lab::{Lab, MARK, SOON, Service, announce, exchange, reset};
use crate::support::net::{Host, Running, wait_for};

const LISTEN: &str = "10.0.0.1:3333";
/// Descriptors that may stay: two workers keep up to sixteen empty pipes each, of two ends.
const POOLED: usize = 2 * 16 * 2;
/// How long a connection may take while something is wrong before its client gives up.
const GIVE_UP: Duration = Duration::from_secs(2);

/// A relay as a process, to a service at 127.0.0.1:2222 that is the test's business.
struct Rig {
    lab: Lab,
    relay: Running,
}

impl Rig {
    fn new() -> Self {
        let lab = Lab::without_pathway();
        configure(&lab.wks, LISTEN);
        pathway(&lab.wks, "add");
        let relay = lab.wks.spawn(lab.wks.mmproxyctl("run echo --workers 2"));
        relay.wait_log("ready");
        Self { lab, relay }
    }

    fn descriptors(&self) -> usize {
        descriptors(&self.relay)
    }

    /// Whether a whole exchange went well. Whatever comes back must be what was sent, in any case.
    fn attempt(&self, client: &str, size: usize) -> bool {
        let relay: SocketAddr = LISTEN.parse().expect("an address");
        let Ok(mut stream) = TcpStream::connect_timeout(&relay, GIVE_UP) else {
            return false;
        };
        stream.set_read_timeout(Some(GIVE_UP)).expect("a timeout");
        stream.set_write_timeout(Some(GIVE_UP)).expect("a timeout");
        let data: Vec<u8> = (0..size).map(|at| (at * 7 + at / 251) as u8).collect();
        let mut sending = stream.try_clone().expect("clone");
        let mut received = Vec::with_capacity(size);
        let good = std::thread::scope(|scope| {
            scope.spawn(|| {
                let sent = sending
                    .write_all(&announce(client))
                    .and_then(|()| sending.write_all(&data));
                let _ = sending.shutdown(std::net::Shutdown::Write);
                sent
            });
            stream.read_to_end(&mut received).is_ok()
        });
        assert!(
            data.starts_with(&received),
            "{client}: something else came back"
        );
        if !good || received.len() < size {
            // gives its place up at once rather than in the kernel's time
            reset(stream);
            return false;
        }
        true
    }

    /// Exchanges on four threads while `fault` goes on; afterwards all of them must go well again.
    fn under_load(&self, fault: impl FnOnce(&AtomicU64)) -> u64 {
        let (over, good, number) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let _load = Ends(&over);
            for _ in 0..4 {
                let (over, good, number) = (&over, &good, &number);
                let work = move || {
                    while !over.load(Ordering::Relaxed) {
                        let number = number.fetch_add(1, Ordering::Relaxed);
                        let client =
                            format!("192.0.2.{}:{}", 1 + number % 200, 2000 + number % 20_000);
                        let size = [100, 10_000, 400_000][number as usize % 3];
                        if self.attempt(&client, size) {
                            good.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                };
                scope.spawn(move || self.lab.vps.enter(work));
            }
            wait_for("a load", || good.load(Ordering::Relaxed) > 40);
            fault(&good);
            let before = good.load(Ordering::Relaxed);
            wait_for("exchanges to go well again", || {
                good.load(Ordering::Relaxed) > before + 40
            });
        });
        self.lab.vps.enter(|| {
            for number in 0..20 {
                assert!(self.attempt(&format!("198.18.0.1:{}", 3000 + number), 10_000));
            }
        });
        good.into_inner()
    }
}

/// Ends the load also where what goes on beside it panics: its threads are waited for.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn configure(wks: &Host, listen: &str) {
    wks.write("etc/pathways.conf", format!("{MARK} connmark=auto\n"));
    wks.write(
        "etc/instances.tsv",
        format!("echo\t{MARK}\t{listen}\t127.0.0.1\t2222\t-\tconnect-timeout=500ms\n"),
    );
    wks.write("etc/allow.txt", "10.0.0.2 # vps01\n");
}

fn pathway(wks: &Host, verb: &str) {
    let done = wks.mmproxyctl(&format!("pathway {verb} {MARK}")).output();
    let done = done.expect("run mmproxyctl");
    assert!(done.status.success(), "{done:?}");
}

fn descriptors(relay: &Running) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", relay.pid()))
        .expect("its descriptors")
        .count()
}

/// A process's own memory, in kB. Not PSS: other tests' processes share the program's pages, and each
/// one that ends makes the share of the others grow.
fn memory_of(relay: &Running) -> u64 {
    let path = format!("/proc/{}/smaps_rollup", relay.pid());
    let text = std::fs::read_to_string(Path::new(&path)).expect("smaps_rollup");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Anonymous:"));
    let word = line.and_then(|line| line.split_whitespace().next());
    word.and_then(|word| word.parse().ok()).expect("Anonymous")
}

/// A service in a process of its own that can be killed.
fn socat(wks: &Host) -> Running {
    let mut command = wks.command("socat");
    command.args([
        "TCP-LISTEN:2222,bind=127.0.0.1,reuseaddr,fork,backlog=500",
        "EXEC:cat",
    ]);
    let service = wks.spawn(command);
    wks.wait_listening(2222);
    service
}

#[test]
fn the_service_is_killed_and_comes_back() {
    let rig = Rig::new();
    let before = rig.descriptors();
    let service = socat(&rig.lab.wks);
    let mut again = None;
    rig.under_load(|_| {
        drop(service);
        rig.relay.wait_log("the service at 127.0.0.1:2222 is down");
        again = Some(socat(&rig.lab.wks));
    });
    wait_for("its descriptors to be closed", || {
        rig.descriptors() <= before + POOLED
    });
    drop(again);
}

#[test]
fn the_pathway_is_removed_and_put_back() {
    let rig = Rig::new();
    let _service = Service::echo(&rig.lab.wks, "127.0.0.1:2222");
    // an open session outlives it, and one that was in the middle of a transfer goes on
    let mut open = rig.lab.dial(LISTEN.parse().unwrap());
    open.write_all(&announce("192.0.2.250:4000")).unwrap();
    exchange(&mut open, b"before");
    let before = rig.descriptors();
    for _ in 0..3 {
        rig.under_load(|_| {
            pathway(&rig.lab.wks, "del");
            open.write_all(b"meanwhile").unwrap();
            rig.relay.wait_log("is the pathway of mark");
            pathway(&rig.lab.wks, "add");
        });
        let mut answer = [0; 9];
        open.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"meanwhile");
        exchange(&mut open, b"after");
    }
    wait_for("its descriptors to be closed", || {
        rig.descriptors() <= before + POOLED
    });
}

#[test]
fn the_proxy_is_killed() {
    let rig = Rig::new();
    let _service = Service::echo(&rig.lab.wks, "127.0.0.1:2222");
    let before = rig.descriptors();
    let proxies: Vec<_> = (0..20)
        .map(|number| {
            let header = format!("PROXY TCP4 192.0.2.9 198.51.100.1 {} 443", 4000 + number);
            let mut proxy = rig.lab.vps.command("sh");
            proxy.arg("-c").arg(format!(
                "{{ printf '{header}\\r\\n'; cat /dev/zero; }} | socat - TCP:{LISTEN} >/dev/null"
            ));
            rig.lab.vps.spawn(proxy)
        })
        .collect();
    let spoofed = || {
        rig.lab
            .wks
            .run("ss -Htn state established src 192.0.2.9")
            .lines()
            .count()
    };
    wait_for("twenty transfers", || spoofed() == 20);
    rig.under_load(|_| drop(proxies));
    wait_for("no connection of theirs to be left", || spoofed() == 0);
    wait_for("its descriptors to be closed", || {
        rig.descriptors() <= before + POOLED
    });
}

#[test]
fn a_thousand_live_transfers_are_drained() {
    const TRANSFERS: u16 = 1000;
    let mut rig = Rig::new();
    let _service = Service::echo(&rig.lab.wks, "127.0.0.1:2222");
    let mut open: Vec<_> = (0..TRANSFERS)
        .map(|number| {
            let mut stream = rig.lab.dial(LISTEN.parse().unwrap());
            let client = format!("192.0.2.7:{}", 4000 + number);
            stream.write_all(&announce(&client)).unwrap();
            exchange(&mut stream, b"begun");
            stream
        })
        .collect();
    let data =
        |number: usize| -> Vec<u8> { (0..48_000).map(|at| (at * 3 + number) as u8).collect() };
    for (number, stream) in open.iter_mut().enumerate() {
        stream.write_all(&data(number)).unwrap();
    }
    rig.relay.signal(Signal::SIGTERM);
    rig.relay.wait_log("no new connections");
    for (number, stream) in open.iter_mut().enumerate() {
        let expected = data(number);
        let mut answer = vec![0; expected.len()];
        stream.read_exact(&mut answer).unwrap();
        assert!(answer == expected, "transfer {number} is corrupt");
        exchange(stream, b"more, while it drains");
    }
    drop(open);
    assert_eq!(rig.relay.wait(SOON).code(), Some(0));
}

/// Many short connections, half of them reset, leave neither descriptors nor memory behind.
fn nothing_is_left_after(connections: usize) {
    let rig = Rig::new();
    let _service = Service::echo(&rig.lab.wks, "127.0.0.1:2222");
    // the proxy's own ports are not what is tested
    rig.lab
        .vps
        .sysctl("net.ipv4.ip_local_port_range", "1024 65000");
    rig.lab.vps.sysctl("net.ipv4.tcp_tw_reuse", "1");
    let run = |connections: usize| {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let (rig, next) = (&rig, &next);
                let work = move || {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= connections {
                            return;
                        }
                        let client =
                            format!("192.0.2.{}:{}", 1 + number / 50_000, 2000 + number % 50_000);
                        let relay: SocketAddr = LISTEN.parse().expect("an address");
                        let mut stream = TcpStream::connect_timeout(&relay, SOON).expect("dial");
                        stream.set_read_timeout(Some(SOON)).expect("a timeout");
                        let mut bytes = announce(&client);
                        bytes.extend_from_slice(&[number as u8; 100]);
                        stream.write_all(&bytes).expect("send");
                        let mut answer = [0; 100];
                        stream.read_exact(&mut answer).expect("an answer");
                        assert_eq!(answer, [number as u8; 100]);
                        if number % 2 == 0 {
                            reset(stream);
                        }
                    }
                };
                scope.spawn(move || rig.lab.vps.enter(work));
            }
        });
        let spoofed = || {
            let all = rig
                .lab
                .wks
                .run("ss -Htn state connected exclude time-wait src 192.0.2.0/24");
            all.is_empty()
        };
        wait_for("all to be closed", spoofed);
    };
    // makes what stays, up to its bounds: buffers, pools, the memory of recent connections
    run(connections.min(10_000));
    let before = (rig.descriptors(), memory_of(&rig.relay));
    run(connections);
    wait_for("its descriptors to be closed", || {
        rig.descriptors() <= before.0
    });
    let after = memory_of(&rig.relay);
    println!(
        "{connections} connections: memory {} kB before, {after} kB after",
        before.1
    );
    assert!(
        after < before.1 + 1024,
        "memory grew from {} to {after} kB",
        before.1
    );
}

#[test]
fn nothing_is_left_of_many_connections() {
    nothing_is_left_after(10_000);
}

#[cfg(feature = "soak")]
#[test]
fn nothing_is_left_of_two_hundred_thousand_connections() {
    nothing_is_left_after(200_000);
}

#[cfg(feature = "soak")]
/// Holds so many idle connections, over as many relay processes as the limit on descriptors takes.
fn idle_connections(connections: usize) {
    /// What a relay and a proxy need beside their connections.
    const OWN: usize = 100;
    let (limit, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
        .map(|(soft, hard)| (hard.max(soft) as usize, soft))
        .expect("RLIMIT_NOFILE");
    // two descriptors each in the relay
    let each = ((limit - OWN) / 2).min(connections);
    let processes = connections.div_ceil(each);
    let each = connections.div_ceil(processes);
    let lab = Lab::new();
    for host in [&lab.wks, &lab.vps] {
        host.sysctl("net.core.somaxconn", "65535");
    }
    // nobody accepts: the kernel does, and it costs the test no descriptor
    let _service = lab.wks.enter(|| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)
            .expect("a listening socket");
        let at: SocketAddr = "127.0.0.1:2222".parse().expect("a listening socket");
        socket.bind(&at.into()).expect("a listening socket");
        socket.listen(65_535).expect("a listening socket");
        socket
    });
    configure(&lab.wks, LISTEN);
    let instances: String = (0..processes)
        .map(|number| {
            let port = 3333 + number;
            format!("idle{number}\t{MARK}\t10.0.0.1:{port}\t127.0.0.1\t2222\t-\n")
        })
        .collect();
    lab.wks.write("etc/instances.tsv", instances);
    let relays: Vec<_> = (0..processes)
        .map(|number| {
            let words = format!("run idle{number} --no-check --workers 2");
            let relay = lab.wks.spawn(lab.wks.mmproxyctl(&words));
            relay.wait_log("ready");
            relay
        })
        .collect();
    let before: Vec<_> = relays
        .iter()
        .map(|relay| (memory_of(relay), descriptors(relay)))
        .collect();
    let _proxies: Vec<_> = (0..processes)
        .map(|number| {
            let mut proxy: std::process::Command = lab.vps.command("bash");
            proxy.arg("-c").arg(format!(
                "ulimit -n $(ulimit -Hn); for ((i = 0; i < {each}; i++)); do \
                 exec {{fd}}<>/dev/tcp/10.0.0.1/{port} || exit 1; \
                 printf 'PROXY TCP4 192.0.2.{client} 198.51.100.1 %d 443\\r\\n' $((2000 + i)) >&$fd; \
                 done; echo all; exec sleep 1000",
                port = 3333 + number,
                client = 1 + number,
            ));
            lab.vps.spawn(proxy)
        })
        .collect();
    let held = || {
        lab.wks
            .run("ss -Htn state established src 192.0.2.0/24")
            .lines()
            .count()
    };
    let end = std::time::Instant::now() + Duration::from_secs(120);
    while held() < each * processes {
        assert!(
            std::time::Instant::now() < end,
            "{} of {connections} connections over {processes} relays, {each} each, with a limit of {limit} descriptors",
            held()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    for (relay, (memory, files)) in relays.iter().zip(before) {
        let bytes = (memory_of(relay) - memory) * 1024 / each as u64;
        let files = descriptors(relay) - files;
        println!(
            "{each} idle connections in one of {processes} relays (limit {limit}): {bytes} bytes and {} descriptors each",
            files as f64 / each as f64
        );
        assert!(
            bytes <= 1024,
            "{bytes} bytes each at {each} in one of {processes} relays"
        );
        assert_eq!(files, 2 * each);
    }
}

// memory to the byte wants a machine that does nothing else: not beside the other tests
#[cfg(feature = "soak")]
#[test]
fn idle_connections_are_small() {
    idle_connections(4000);
}

#[cfg(feature = "soak")]
#[test]
fn twenty_thousand_idle_connections() {
    idle_connections(20_000);
}
