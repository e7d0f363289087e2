//! One process with many relays: start, failure, reload, hand-over, end.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::support::net::{Host, Running, wait_for};

const PATHWAYS: &str = "123\n124\n";
const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);

/// A host with services on loopback that send everything back, with their port in front.
pub(crate) struct Lab {
    pub(crate) host: Host,
}

impl Lab {
    pub(crate) fn new(services: &[u16]) -> Self {
        let lab = Self {
            host: Host::new("wks01"),
        };
        lab.host.write("etc/pathways.conf", PATHWAYS);
        lab.allow("127.0.0.1\n");
        for &port in services {
            let listener = lab
                .host
                .enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("bind"));
            std::thread::spawn(move || echo(&listener, port));
        }
        lab
    }

    pub(crate) fn allow(&self, text: &str) {
        self.host.write("etc/allow.txt", text);
    }

    /// Writes `name mark listen-port target-port` lines as instances.tsv.
    pub(crate) fn instances(&self, lines: &[(&str, u8, u16, u16)]) {
        let text: String = lines
            .iter()
            .map(|(name, mark, listen, target)| {
                format!("{name}\t{mark}\t127.0.0.1:{listen}\t127.0.0.1\t{target}\t-\n")
            })
            .collect();
        self.host.write("etc/instances.tsv", text);
    }

    pub(crate) fn run(&self, words: &str) -> Running {
        let running = self
            .host
            .spawn(self.host.mmproxyctl(&format!("run {words}")));
        running.wait_log("INFO ready");
        running
    }

    pub(crate) fn ctl(&self, words: &str) -> Output {
        self.host.mmproxyctl(words).output().expect("mmproxyctl")
    }

    /// Reloads and returns what `--json` says of the one process there is.
    pub(crate) fn reload(&self, process: &str) -> serde_json::Value {
        let output = self.ctl("reload --json");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}{}", stderr(&output));
        let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        json[process].clone()
    }

    pub(crate) fn proxied(&self, port: u16, client_port: u16) -> std::io::Result<Proxied> {
        self.host.enter(|| Proxied::open(port, client_port))
    }
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub(crate) fn echo(listener: &TcpListener, port: u16) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { return };
        // a connection that sends nothing costs no thread's stack worth speaking of
        let thread = std::thread::Builder::new().stack_size(32 << 10);
        let spawned = thread.spawn(move || {
            let mut buffer = [0; 256];
            if stream.write_all(format!("{port}\n").as_bytes()).is_err() {
                return;
            }
            while let Ok(length @ 1..) = stream.read(&mut buffer) {
                if stream.write_all(&buffer[..length]).is_err() {
                    return;
                }
            }
        });
        spawned.expect("thread");
    }
}

/// A connection as the proxy makes it.
pub(crate) struct Proxied {
    pub(crate) stream: TcpStream,
    /// The port of the service at its far end.
    pub(crate) service: u16,
}

impl Proxied {
    pub(crate) fn open(port: u16, client_port: u16) -> std::io::Result<Self> {
        let addr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
        let mut stream = TcpStream::connect_timeout(&addr, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(
            stream,
            "PROXY TCP4 {CLIENT} 127.0.0.1 {client_port} {port}\r\n"
        )?;
        let mut greeting = Vec::new();
        while greeting.last() != Some(&b'\n') {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            greeting.push(byte[0]);
        }
        let service = String::from_utf8_lossy(&greeting).trim().parse();
        let service = service.map_err(std::io::Error::other)?;
        Ok(Self { stream, service })
    }

    pub(crate) fn echo(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).expect("write");
        let mut back = vec![0; text.len()];
        self.stream
            .read_exact(&mut back)
            .expect("the connection is alive");
        assert_eq!(back, text.as_bytes());
    }

    pub(crate) fn close(self) {
        self.stream.shutdown(Shutdown::Both).expect("close");
    }
}

#[test]
fn one_failing_instance_leaves_the_others_alone() {
    let lab = Lab::new(&[9001, 9002]);
    let taken = lab
        .host
        .enter(|| TcpListener::bind("127.0.0.1:2002").expect("bind"));
    lab.instances(&[("good", 123, 2001, 9001), ("bad", 124, 2002, 9002)]);
    let running = lab
        .host
        .spawn(lab.host.mmproxyctl("run --all --manage-pathways"));
    running.wait_log("instance=\"bad\"");
    running.wait_log("relaying instance=good");
    assert!(
        running.log().contains("127.0.0.1:2002"),
        "{}",
        running.log()
    );
    assert_eq!(lab.proxied(2001, 40001).expect("relayed").service, 9001);
    // not every listener is bound
    assert!(!running.log().contains("INFO ready"), "{}", running.log());
    drop(taken);
    running.wait_log("INFO ready");
    assert_eq!(lab.proxied(2002, 40002).expect("relayed").service, 9002);
}

#[test]
fn a_process_without_a_single_relay_fails() {
    let lab = Lab::new(&[]);
    let _taken = lab
        .host
        .enter(|| TcpListener::bind("127.0.0.1:2001").expect("bind"));
    lab.instances(&[("web", 123, 2001, 9001)]);
    let output = lab.ctl("run web --no-check");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("cannot listen on 127.0.0.1:2001"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn an_instance_runs_once_whoever_runs_it() {
    let lab = Lab::new(&[9001, 9002]);
    lab.instances(&[("a", 123, 2001, 9001), ("b", 123, 2002, 9002)]);
    let mut single = lab.run("a --no-check");
    let all = lab.host.spawn(lab.host.mmproxyctl("run --all --no-check"));
    all.wait_log(&format!("already running, pid {}", single.pid()));
    lab.host.wait_listening(2002);
    let again = lab.ctl("run a --no-check");
    assert!(again.status.success());
    assert!(
        String::from_utf8_lossy(&again.stdout)
            .contains(&format!("already running, pid {}", single.pid()))
    );
    single.signal(Signal::SIGTERM);
    assert!(single.wait(Duration::from_secs(5)).success());
    // the lock is free: the process that runs all takes it over
    all.wait_log("INFO ready");
    lab.host.wait_listening(2001);
}

#[test]
fn pathways_are_installed_and_removed() {
    let lab = Lab::new(&[9001]);
    lab.instances(&[("a", 123, 2001, 9001)]);
    let mut running = lab.run("--all --manage-pathways");
    assert!(
        lab.host.ip("rule").contains("fwmark 0x7b"),
        "{}",
        lab.host.ip("rule")
    );
    assert!(
        !lab.host.ip("rule").contains("fwmark 0x7c"),
        "{}",
        lab.host.ip("rule")
    );
    lab.instances(&[("a", 124, 2001, 9001)]);
    let changes = lab.reload("all");
    assert_eq!(changes["pathways_appeared"], serde_json::json!([124]));
    assert_eq!(changes["pathways_disappeared"], serde_json::json!([123]));
    wait_for("the pathway to go that no connection uses", || {
        !lab.host.ip("rule").contains("fwmark 0x7b")
    });
    assert_eq!(lab.proxied(2001, 40001).expect("relayed").service, 9001);
    running.signal(Signal::SIGTERM);
    assert!(running.wait(Duration::from_secs(10)).success());
    assert!(
        !lab.host.ip("rule").contains("fwmark"),
        "{}",
        lab.host.ip("rule")
    );
    assert!(!lab.host.run("iptables-save").contains("CONNMARK"));
}

#[test]
fn pathways_are_kept_by_the_process_that_manages_them() {
    let lab = Lab::new(&[9001]);
    lab.instances(&[("a", 123, 2001, 9001)]);
    let mut running = lab.run("--all --manage-pathways");
    let lost = |mark: &str| {
        let words = format!("rule del priority 100 from 127.0.0.0/8 fwmark {mark}/0xff iif lo");
        lab.host.ip(&words);
        lab.host.run("iptables -t mangle -F");
    };
    let kept = |mark: u64, pid: u64, repairs: u64| {
        let output = lab.ctl("pathway list --json");
        let listed: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let of = |entry: &&serde_json::Value| entry["mark"] == mark;
        let entry = listed
            .as_array()
            .expect("pathways")
            .iter()
            .find(of)
            .cloned();
        let entry = entry.expect("the pathway");
        entry["state"] == "in-place"
            && entry["kept_by"] == serde_json::json!([pid])
            && entry["repairs"]["rule"] == repairs
            && entry["repairs"]["firewall"] == 3 * repairs
    };
    let pid = u64::try_from(running.pid().as_raw()).expect("pid");
    lost("123");
    wait_for("a repair", || kept(123, pid, 1));
    running.wait_log("WARN repaired");
    // what a reload removes is not put back, and what it adds is kept
    lab.instances(&[("a", 124, 2001, 9001)]);
    lab.reload("all");
    wait_for("the other one to go", || {
        !lab.host.ip("rule").contains("lookup 123")
    });
    lost("124");
    wait_for("a repair of the new pathway", || kept(124, pid, 1));
    assert!(!lab.host.ip("rule").contains("lookup 123"));
    // who takes over keeps them, and begins to count
    let output = lab.ctl("upgrade --json");
    assert!(output.status.success(), "{}", stderr(&output));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let pid = json["all"]["to"].as_u64().expect("pid");
    assert!(running.wait(Duration::from_secs(10)).success());
    lost("124");
    wait_for("a repair by the successor", || kept(124, pid, 1));
    let last = nix::unistd::Pid::from_raw(i32::try_from(pid).expect("pid"));
    nix::sys::signal::kill(last, Signal::SIGTERM).expect("end the successor");
    wait_for("the end of the successor", || {
        nix::sys::signal::kill(last, None).is_err()
    });
    assert!(!lab.host.ip("rule").contains("proto 177"));
}

#[test]
fn a_reload_applies_the_difference_and_drops_nothing() {
    let lab = Lab::new(&[9001, 9002, 9003]);
    lab.instances(&[
        ("kept", 123, 2001, 9001),
        ("moved", 123, 2002, 9002),
        ("gone", 124, 2003, 9003),
        ("retargeted", 124, 2004, 9001),
    ]);
    let running = lab.run("--all --manage-pathways");
    let mut open: Vec<Proxied> = (2001..=2004)
        .map(|port| lab.proxied(port, 38000 + port).expect("relayed"))
        .collect();
    lab.instances(&[
        ("kept", 123, 2001, 9001),
        ("moved", 123, 2022, 9002),
        ("retargeted", 124, 2004, 9003),
        // on the address of the one that is gone
        ("new", 124, 2003, 9001),
    ]);
    let changes = lab.reload("all");
    assert_eq!(changes["started"], serde_json::json!(["new"]));
    assert_eq!(changes["stopped"], serde_json::json!(["gone"]));
    assert_eq!(
        changes["changed"],
        serde_json::json!(["retargeted", "moved"])
    );
    assert_eq!(changes["unchanged"], 1);
    assert_eq!(changes["failing"], serde_json::json!({}));
    for connection in &mut open {
        connection.echo("still there");
    }
    for (port, service) in [(2001, 9001), (2022, 9002), (2003, 9001), (2004, 9003)] {
        let opened = lab.proxied(port, 39000 + port).expect("relayed");
        assert_eq!(opened.service, service, "port {port}");
    }
    assert!(lab.proxied(2002, 41000).is_err());
    open.into_iter().for_each(Proxied::close);
    drop(running);
}

#[test]
fn a_mistake_changes_nothing_and_is_shown_to_the_caller() {
    let lab = Lab::new(&[9001]);
    lab.instances(&[("a", 123, 2001, 9001)]);
    let running = lab.run("a --manage-pathways");
    lab.host.write(
        "etc/instances.tsv",
        "a\t123\t127.0.0.1:2001\t127.0.0.1\t9001\t-\nb\t99\t127.0.0.1:2002\t127.0.0.1\t9001\t-\n",
    );
    let output = lab.ctl("reload");
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("instances.tsv:2"),
        "{}",
        stderr(&output)
    );
    // the signal has nobody to tell but the log
    running.signal(Signal::SIGHUP);
    running.wait_log("not reloaded, nothing was changed");
    assert_eq!(lab.proxied(2001, 40001).expect("relayed").service, 9001);
}

#[test]
fn a_reload_that_leaves_an_instance_down_fails_and_the_others_serve() {
    let lab = Lab::new(&[9001]);
    lab.instances(&[("a", 123, 2001, 9001)]);
    let _running = lab.run("--all --manage-pathways");
    let taken = lab
        .host
        .enter(|| TcpListener::bind("127.0.0.1:2002").expect("bind"));
    lab.instances(&[("a", 123, 2001, 9001), ("b", 123, 2002, 9001)]);
    let output = lab.ctl("reload");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("all: not running: b: "), "{said}");
    assert!(said.contains("all: started: b"), "{said}");
    assert_eq!(lab.proxied(2001, 40001).expect("relayed").service, 9001);
    // nothing is different the second time, and it still does not run
    let output = lab.ctl("reload --json");
    assert_eq!(output.status.code(), Some(1));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let why = json["all"]["failing"]["b"].as_str().expect("why");
    assert!(why.contains("in use"), "{json}");
    drop(taken);
    wait_for("b to be tried again", || lab.proxied(2002, 40002).is_ok());
    assert_eq!(lab.reload("all")["failing"], serde_json::json!({}));
}

#[test]
fn the_allow_list_takes_effect_at_once() {
    let lab = Lab::new(&[9001]);
    lab.instances(&[("a", 123, 2001, 9001)]);
    let running = lab.run("a --manage-pathways --watch-config");
    let mut open = lab.proxied(2001, 40001).expect("relayed");
    lab.allow("10.0.0.1\n");
    lab.reload("a");
    assert!(lab.proxied(2001, 40002).is_err());
    open.echo("let in before");
    // and by itself, since it watches the files
    lab.allow("127.0.0.0/8\n");
    wait_for("the allow list by itself", || {
        lab.proxied(2001, 40003).is_ok()
    });
    drop(running);
}

/// Connects without a pause until told to stop; each one must reach the service.
pub(crate) struct Traffic {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<Result<(), String>>>,
}

impl Traffic {
    pub(crate) fn start(lab: &Lab, port: u16) -> Self {
        let (stop, served) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (stopped, counted, host) = (Arc::clone(&stop), Arc::clone(&served), lab.host.clone());
        let thread = std::thread::spawn(move || {
            host.enter(|| {
                let mut client_port = 10000;
                while !stopped.load(Ordering::Relaxed) {
                    client_port = 10000 + (client_port + 1) % 20000;
                    let mut opened = Proxied::open(port, client_port)
                        .map_err(|error| format!("connection {client_port}: {error}"))?;
                    opened.echo("x");
                    counted.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            })
        });
        Self {
            stop,
            served,
            thread: Some(thread),
        }
    }

    /// Waits until some more were served.
    pub(crate) fn flows(&self) {
        let before = self.served.load(Ordering::Relaxed);
        wait_for("traffic", || {
            let failed = self
                .thread
                .as_ref()
                .is_some_and(|thread| thread.is_finished());
            failed || self.served.load(Ordering::Relaxed) > before + 20
        });
    }

    pub(crate) fn finish(mut self) {
        self.flows();
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("runs");
        thread
            .join()
            .expect("traffic")
            .expect("every connection is served");
    }
}

/// A service of one thread that can hold thousands of connections.
fn echo_many(host: &Host, port: u16) {
    let listener = host.enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("bind"));
    listener.set_nonblocking(true).expect("non-blocking");
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).expect("listener");
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.split();
                    let greeting = format!("{port}\n");
                    let greeted =
                        tokio::io::AsyncWriteExt::write_all(&mut write, greeting.as_bytes());
                    if greeted.await.is_ok() {
                        // however it ends, the test sees it on its side
                        let _ = tokio::io::copy(&mut read, &mut write).await;
                    }
                });
            }
        });
    });
}

/// Holds connections over reloads that each change something, with new connections all the time.
#[test]
fn reloads_drop_and_refuse_nothing() {
    let lab = Lab::new(&[]);
    echo_many(&lab.host, 9001);
    echo_many(&lab.host, 9002);
    lab.instances(&[("a", 123, 2001, 9001)]);
    let running = lab.run("--all --manage-pathways");
    let mut open: Vec<Proxied> = (0..300)
        .map(|number| lab.proxied(2001, 30000 + number).expect("relayed"))
        .collect();
    let traffic = Traffic::start(&lab, 2001);
    traffic.flows();
    for number in 0..12 {
        match number % 4 {
            0 => lab.instances(&[("a", 123, 2001, 9002)]),
            1 => lab.instances(&[("a", 124, 2001, 9002), ("b", 123, 2002, 9001)]),
            2 => lab.allow("127.0.0.1\n10.0.0.0/8\n"),
            // another name on the same address: its sockets go on
            _ => {
                lab.allow("127.0.0.1\n");
                lab.instances(&[("c", 123, 2001, 9001)]);
            }
        }
        let changes = lab.reload("all");
        assert_eq!(changes["failing"], serde_json::json!({}), "reload {number}");
        if number % 4 == 3 {
            lab.instances(&[("a", 123, 2001, 9001)]);
            lab.reload("all");
        }
    }
    traffic.finish();
    for connection in &mut open {
        connection.echo("still there");
    }
    drop(running);
}

#[test]
fn a_thousand_instances_start_and_reload_fast() {
    let lab = Lab::new(&[9001]);
    let lines = |changed: u16| -> Vec<(String, u16)> {
        (0..1000)
            .map(|n| (format!("i{n}"), if n == changed { 9002 } else { 9001 }))
            .collect()
    };
    let write = |changed| {
        let lines = lines(changed);
        let lines: Vec<_> = (10000..)
            .zip(&lines)
            .map(|(port, (name, target))| (name.as_str(), 123, port, *target))
            .collect();
        lab.instances(&lines);
    };
    write(u16::MAX);
    assert!(lab.ctl("pathway add-all").status.success());
    let begin = Instant::now();
    let running = lab.run("--all");
    let started = begin.elapsed();
    let status =
        std::fs::read_to_string(format!("/proc/{}/status", running.pid())).expect("status");
    let resident = status
        .lines()
        .find(|line| line.starts_with("VmRSS"))
        .expect("VmRSS");
    write(500);
    let begin = Instant::now();
    let changes = lab.reload("all");
    let reloaded = begin.elapsed();
    assert_eq!(changes["changed"], serde_json::json!(["i500"]));
    assert_eq!(changes["unchanged"], 999);
    assert_eq!(lab.proxied(10999, 40001).expect("relayed").service, 9001);
    println!("1000 instances: started in {started:?}, {resident}, reloaded in {reloaded:?}");
    // generous: other tests run beside this one
    assert!(started < Duration::from_secs(6), "{started:?}");
    assert!(reloaded < Duration::from_secs(2), "{reloaded:?}");
}
