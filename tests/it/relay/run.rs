//! `mmproxyctl run`: from the files to a drained end, as a process.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::process::Output;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::lab::{SOON, Service, announce, assert_closed, exchange};
use crate::support::net::{Host, Running, wait_for};

const LISTEN: &str = "10.0.0.1:2222";

/// A configured host with a service, and a host to be the proxy.
struct Rig {
    wks: Host,
    vps: Host,
    service: Service,
}

impl Rig {
    fn new() -> Self {
        Self::with_options("")
    }

    /// With these options of the instance.
    fn with_options(options: &str) -> Self {
        let (wks, vps) = (Host::new("wks01"), Host::new("vps01"));
        wks.link("eth0", &["10.0.0.1/24"], &vps, "eth0", &["10.0.0.2/24"]);
        let service = Service::echo(&wks, "127.0.0.1:0");
        let port = service.addr.port();
        wks.write("etc/pathways.conf", "123 connmark=auto # vps01\n");
        wks.write(
            "etc/instances.tsv",
            format!("echo\t123\t{LISTEN}\t127.0.0.1\t{port}\t-\t{options}\n"),
        );
        wks.write("etc/allow.txt", "10.0.0.2 # vps01\n");
        Self { wks, vps, service }
    }

    fn install_pathway(&self) {
        let done = self.output("pathway add 123");
        assert!(done.status.success(), "{done:?}");
    }

    fn output(&self, words: &str) -> Output {
        self.wks.mmproxyctl(words).output().expect("run mmproxyctl")
    }

    /// A relay that is ready.
    fn start(&self, words: &str) -> Running {
        let running = self.wks.spawn(self.wks.mmproxyctl(words));
        self.wks.wait_listening(2222);
        running
    }

    fn dial(&self) -> TcpStream {
        let relay: SocketAddr = LISTEN.parse().expect("an address");
        let stream = self
            .vps
            .enter(|| TcpStream::connect_timeout(&relay, SOON))
            .expect("connect to the relay");
        stream.set_read_timeout(Some(SOON)).expect("read timeout");
        stream
    }

    /// A connection that was relayed.
    fn connect(&self, client: &str) -> TcpStream {
        let mut stream = self.dial();
        stream.write_all(&announce(client)).expect("send");
        exchange(&mut stream, b"hello");
        assert_eq!(self.service.peer(), client.parse().expect("an address"));
        stream
    }

    /// Sends bytes and waits for the relay to close.
    fn refused(&self, bytes: &[u8]) {
        let mut stream = self.dial();
        let _ = stream.write_all(bytes);
        assert_closed(&mut stream, &bytes.escape_ascii().to_string());
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn refuses_to_start_without_its_pathway() {
    let rig = Rig::new();
    let output = rig.output("run echo");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = stderr(&output);
    assert!(said.contains("rule missing"), "{said}");
    assert!(said.contains("from 127.0.0.0/8"), "{said}");
    assert!(said.contains("mmproxyctl pathway add 123"), "{said}");
    rig.install_pathway();
    let _relay = rig.start("run echo");
    rig.connect("192.0.2.7:4000");
}

#[test]
fn starts_without_its_pathway_when_told_so() {
    let rig = Rig::new();
    let relay = rig.start("run echo --no-check");
    // nobody routes back to this client, and 10.0.0.2 is really there
    let mut stream = rig.dial();
    stream.write_all(b"PROXY UNKNOWN\r\n").unwrap();
    drop(stream);
    assert!(!relay.log().contains("not in place"), "{}", relay.log());
}

/// What `run` has to do with io_uring, when eight clients exchange at once.
fn calls_of_io_uring(words: &str, inject: Option<&str>) -> String {
    let rig = Rig::new();
    rig.install_pathway();
    let calls = rig.wks.write("calls", "");
    let target = rig.wks.mmproxyctl(words);
    let mut command = rig.wks.command("strace");
    command
        // the tracer is the child of its own: the program is what we start and stop
        .args(["-D", "-f", "-qq", "-o"])
        .arg(&calls)
        .args(["-e", "signal=none"])
        .args(["-e", "trace=io_uring_setup,io_uring_enter"])
        .args(inject)
        .arg(target.get_program())
        .args(target.get_args());
    let mut relay = rig.wks.spawn(command);
    rig.wks.wait_listening(2222);
    std::thread::scope(|scope| {
        for client in 1..=8 {
            let mut stream = rig.connect(&format!("192.0.2.{client}:4000"));
            scope.spawn(move || (0..100).for_each(|_| exchange(&mut stream, b"hello again")));
        }
    });
    relay.signal(Signal::SIGTERM);
    relay.wait(SOON);
    std::fs::read_to_string(calls).expect("what strace wrote")
}

#[test]
fn io_uring_is_used_where_it_is_wanted_and_allowed() {
    let calls = calls_of_io_uring("run echo --workers 1", None);
    assert!(calls.contains("io_uring_enter("), "{calls}");
    let calls = calls_of_io_uring("run echo --workers 1 --no-io-uring", None);
    assert!(calls.is_empty(), "{calls}");
    let denied = "--inject=io_uring_setup:error=EPERM";
    let calls = calls_of_io_uring("run echo --workers 1", Some(denied));
    assert!(calls.contains("EPERM"), "{calls}");
    assert!(!calls.contains("io_uring_enter("), "{calls}");
}

#[test]
fn a_second_run_says_so_and_succeeds() {
    let rig = Rig::new();
    let relay = rig.start("run echo --no-check");
    let output = rig.output("run echo --no-check");
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(
        said,
        format!("echo: already running, pid {}\n", relay.pid())
    );
    // the first is gone: the next one runs
    drop(relay);
    let _relay = rig.start("run echo --no-check");
}

#[test]
fn drains_on_sigterm() {
    let rig = Rig::new();
    rig.install_pathway();
    let mut relay = rig.start("run echo");
    let mut open = rig.connect("192.0.2.7:4000");
    relay.signal(Signal::SIGTERM);
    relay.wait_log("no new connections");
    wait_for("the listener closed", || {
        !rig.vps.can_connect([10, 0, 0, 1].into(), 2222)
    });
    exchange(&mut open, b"still served");
    drop(open);
    assert_eq!(relay.wait(SOON).code(), Some(0));
}

#[test]
fn cuts_what_does_not_end_in_time() {
    let rig = Rig::new();
    rig.install_pathway();
    let mut relay = rig.start("run echo --drain-timeout 200ms");
    let mut open = rig.connect("192.0.2.7:4000");
    relay.signal(Signal::SIGTERM);
    assert_closed(&mut open, "cut");
    assert_eq!(relay.wait(SOON).code(), Some(0));
    assert!(relay.log().contains("drain timeout is over"));
}

#[test]
fn a_second_signal_ends_at_once() {
    let rig = Rig::new();
    rig.install_pathway();
    let mut relay = rig.start("run echo --drain-timeout 1h");
    let mut open = rig.connect("192.0.2.7:4000");
    relay.signal(Signal::SIGTERM);
    relay.wait_log("no new connections");
    exchange(&mut open, b"still served");
    relay.signal(Signal::SIGINT);
    assert_closed(&mut open, "cut");
    assert_eq!(relay.wait(SOON).code(), Some(0));
}

#[test]
fn tells_systemd_when_it_is_ready_and_stops() {
    let rig = Rig::new();
    let path = rig.wks.dir().join("notify");
    let systemd = UnixDatagram::bind(&path).unwrap();
    systemd.set_read_timeout(Some(SOON)).unwrap();
    let mut command = rig.wks.mmproxyctl("run echo --no-check");
    command.env("NOTIFY_SOCKET", &path);
    let mut relay = rig.wks.spawn(command);
    // listeners that systemd is asked to keep come before
    let heard = |wanted: &str| {
        let mut message = [0; 256];
        loop {
            let length = systemd.recv(&mut message).expect(wanted);
            let text = String::from_utf8_lossy(&message[..length]);
            if text.lines().any(|line| line == wanted) {
                break;
            }
        }
    };
    heard("READY=1");
    // ready means that connections are accepted
    drop(rig.dial());
    relay.signal(Signal::SIGTERM);
    heard("STOPPING=1");
    assert_eq!(relay.wait(SOON).code(), Some(0));
}

#[test]
fn says_why_a_connection_was_refused() {
    let rig = Rig::with_options("header-timeout=200ms,connect-timeout=200ms");
    let relay = rig.start("run echo --no-check");
    for (bytes, said) in [
        (&b"SSH-2.0-OpenSSH_9.7\r\n"[..], "an SSH banner"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "TLS"),
        (b"GET / HTTP/1.1\r\n\r\n", "HTTP"),
        (b"GET / HTTP/1.1\r\n\r\n", "add send-proxy"),
        (b"PROXY TCP9 1 2 3 4\r\n", "v1 protocol is none of"),
        (&announce("127.0.0.1:4000"), "127.0.0.1:4000"),
        (&announce("127.0.0.1:4000"), "loopback"),
        (&announce("[2001:db8::1]:4000"), "no IPv6 target"),
        (b"", "AWS NLB"),
        (&announce("192.0.2.7:4000"), "mmproxyctl pathway check 123"),
    ] {
        rig.refused(bytes);
        relay.wait_log(said);
    }
    rig.vps.address("eth0", "10.0.0.9/24");
    let output = rig
        .vps
        .try_run("curl --silent --interface 10.0.0.9 --max-time 5 http://10.0.0.1:2222/");
    assert!(!output.status.success());
    relay.wait_log("not on the allow list");
    relay.wait_log("proxy.addr=10.0.0.9:");
    let log = relay.log();
    let warnings = log.lines().filter(|line| line.contains("WARN"));
    for line in warnings {
        assert!(line.contains("instance=echo"), "{line}");
        assert!(line.contains("proxy.addr=10.0.0."), "{line}");
    }
}

#[test]
fn a_service_that_is_down_is_named() {
    let rig = Rig::new();
    rig.install_pathway();
    let relay = rig.start("run echo");
    let down = rig.service.addr;
    drop(rig.service);
    let relay_addr: SocketAddr = LISTEN.parse().unwrap();
    let mut stream = rig
        .vps
        .enter(|| TcpStream::connect_timeout(&relay_addr, SOON))
        .unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(&announce("192.0.2.7:4000")).unwrap();
    assert_closed(&mut stream, "service down");
    relay.wait_log(&format!("the service at {down} is down"));
}

/// The same mistake over and over is said a few times, then counted; `-v` says each.
#[test]
fn repeated_warnings_are_held_back() {
    let rig = Rig::new();
    for (words, lines) in [("run echo --no-check", 5), ("-v run echo --no-check", 20)] {
        let mut relay = rig.start(words);
        for _ in 0..20 {
            rig.refused(b"SSH-2.0-OpenSSH_9.7\r\n");
        }
        relay.signal(Signal::SIGTERM);
        relay.wait(SOON);
        let log = relay.log();
        assert_eq!(log.matches("an SSH banner").count(), lines, "{log}");
    }
}

#[test]
fn levels_and_formats_of_the_log() {
    let rig = Rig::new();
    rig.install_pathway();
    let log_of = |words: &str| {
        let mut relay = rig.start(words);
        drop(rig.dial());
        drop(rig.connect("192.0.2.7:4000"));
        rig.refused(b"SSH-2.0-OpenSSH_9.7\r\n");
        relay.signal(Signal::SIGTERM);
        relay.wait(SOON);
        relay.log()
    };
    let has = |log: &str, expected: [bool; 4]| {
        for (text, expected) in [
            ("an SSH banner", true),
            ("relaying", expected[0]),
            ("a health check", expected[1]),
            ("connected to the service", expected[2]),
            ("closed", expected[3]),
        ] {
            assert_eq!(log.contains(text), expected, "{text}:\n{log}");
        }
    };
    has(&log_of("-q run echo"), [false, false, false, false]);
    has(&log_of("run echo"), [true, false, false, false]);
    has(&log_of("-v run echo"), [true, true, false, true]);
    has(&log_of("-vv run echo"), [true, true, true, true]);
    let json = log_of("--log-format json -vv run echo");
    let lines: Vec<serde_json::Value> = json
        .lines()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect();
    let closed = lines
        .iter()
        .find(|line| line["message"] == "closed")
        .expect("a line about the end");
    assert_eq!(closed["client.addr"], "192.0.2.7:4000");
    assert_eq!(closed["bytes.in"], 5);
    assert_eq!(closed["bytes.out"], 5);
    assert_eq!(closed["span"]["instance"], "echo");
}

#[test]
fn mistakes_of_the_caller_are_exit_code_2() {
    let rig = Rig::new();
    let unknown = rig.output("run nobody");
    assert_eq!(unknown.status.code(), Some(2));
    assert!(stderr(&unknown).contains("'nobody'") && stderr(&unknown).contains("echo"));
    rig.wks.write("etc/allow.txt", "# nobody\n");
    let closed = rig.output("run echo");
    assert_eq!(closed.status.code(), Some(2), "{}", stderr(&closed));
}

#[test]
fn without_the_capability_one_sentence_says_so() {
    let rig = Rig::new();
    let relay = rig.wks.mmproxyctl("run echo");
    let mut command = rig.wks.command("setpriv");
    command
        .arg("--bounding-set=-net_admin,-net_raw")
        .arg(relay.get_program())
        .args(relay.get_args());
    let output = command.output().expect("setpriv (util-linux)");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = stderr(&output);
    assert!(said.contains("CAP_NET_ADMIN"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn a_taken_listen_address_is_named() {
    let rig = Rig::new();
    let _other = Service::echo(&rig.wks, LISTEN);
    let output = rig.output("run echo --no-check");
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(said.contains(LISTEN) && said.contains("in use"), "{said}");
}

#[test]
fn an_address_that_is_not_there_yet_is_said() {
    let rig = Rig::new();
    let port = rig.service.addr.port();
    rig.wks.write(
        "etc/instances.tsv",
        format!("echo\t123\t100.64.0.1:2222\t127.0.0.1\t{port}\t-\n"),
    );
    let relay = rig.start("run echo --no-check");
    relay.wait_log("on no interface yet");
    rig.wks.address("eth0", "100.64.0.1/32");
    rig.vps.ip("route add 100.64.0.1/32 via 10.0.0.1");
    assert!(rig.vps.can_connect([100, 64, 0, 1].into(), 2222));
}

/// The soft limit is raised; when even the hard one is used up, accepting pauses, once in the log, and goes on.
#[test]
fn running_out_of_descriptors_is_survived() {
    let rig = Rig::with_options("header-timeout=1h");
    let relay = rig.wks.mmproxyctl("run echo --no-check --workers 1");
    let mut command = rig.wks.command("sh");
    for (name, value) in relay.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
        .arg("-c")
        .arg("ulimit -Sn 20; ulimit -Hn 40; exec \"$0\" \"$@\"")
        .arg(relay.get_program())
        .args(relay.get_args());
    let relay = rig.wks.spawn(command);
    rig.wks.wait_listening(2222);
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", relay.pid())).unwrap();
    let open_files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let open_files: Vec<_> = open_files.unwrap().split_whitespace().collect();
    assert_eq!(open_files[3..5], ["40", "40"]);
    let silent: Vec<_> = (0..60).map(|_| rig.dial()).collect();
    relay.wait_log("accepting pauses");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(relay.log().matches("accepting pauses").count(), 1);
    drop(silent);
    // a listener that lives hears a connection without a header and sees it end
    wait_for("a connection that is served", || {
        let mut stream = rig.dial();
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").is_ok()
            && !matches!(stream.read(&mut [0; 1]), Ok(1..))
            && relay.log().contains("HTTP")
    });
}
