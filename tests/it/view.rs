//! What a running process shows of itself: status, connections, metrics, log lines; and what it does with
//! bytes on its control socket that are no request.

mod journal;
mod metrics;
mod pipe;
mod terminal;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Output;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::net::{Host, Running, wait_for};

const RELAY: &str = "127.0.0.1:2222";
const SERVICE: u16 = 22;

/// A host with one relay, `web`, before a service that sends everything back.
struct Lab {
    host: Host,
}

impl Lab {
    fn new() -> Self {
        let host = Host::new("wks01");
        host.write("etc/pathways.conf", "123 name=vps01 connmark=auto\n");
        host.write("etc/allow.txt", "127.0.0.1\n");
        let lines = format!(
            "web\t123\t{RELAY}\t127.0.0.1\t{SERVICE}\t-\nspare\t123\t127.0.0.1:2223\t127.0.0.1\t23\t-\n"
        );
        host.write("etc/instances.tsv", lines);
        let listener = host.enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, SERVICE)));
        let listener = listener.expect("bind");
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || echo(stream));
            }
        });
        Self { host }
    }

    fn run(&self, words: &str) -> Running {
        let command = format!("run --all --manage-pathways {words}");
        let running = self.host.spawn(self.host.mmproxyctl(&command));
        wait_for("the relays to be ready", || {
            let log = running.log();
            log.contains("INFO ready") || log.contains("\"message\":\"ready\"")
        });
        running
    }

    fn ctl(&self, words: &str) -> Output {
        self.host.mmproxyctl(words).output().expect("mmproxyctl")
    }

    /// stdout of a verb that succeeds.
    fn text(&self, words: &str) -> String {
        let output = self.ctl(words);
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words}: {text}{errors}");
        text
    }

    fn json(&self, words: &str) -> Value {
        serde_json::from_str(&self.text(&format!("{words} --json"))).expect("JSON")
    }

    /// The row of the instance `web`.
    fn web(&self) -> Value {
        self.json("status web")[0]["instances"][0].clone()
    }

    /// A connection of a client's, through which a greeting has gone there and back.
    fn client(&self, header: &[u8], greeting: &str) -> TcpStream {
        let mut stream = self
            .host
            .enter(|| TcpStream::connect(RELAY))
            .expect("connect");
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .expect("time limit");
        stream.write_all(header).expect("write");
        stream.write_all(greeting.as_bytes()).expect("write");
        let mut answer = vec![0; greeting.len()];
        stream.read_exact(&mut answer).expect("read");
        assert_eq!(answer, greeting.as_bytes());
        stream
    }

    /// Sends bytes that are no header; returns when the relay has closed.
    fn nonsense(&self) {
        let mut stream = self
            .host
            .enter(|| TcpStream::connect(RELAY))
            .expect("connect");
        stream.write_all(b"SSH-2.0-nonsense\r\n").expect("write");
        assert_closed(&mut stream);
    }

    fn control_socket(&self) -> PathBuf {
        let run = std::fs::read_dir(self.host.dir().join("run")).expect("runtime directory");
        run.map(|entry| entry.expect("entry").path())
            .find(|path| path.extension().is_some_and(|suffix| suffix == "sock"))
            .expect("a control socket")
    }
}

fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

fn v1(client: &str, port: u16) -> Vec<u8> {
    format!("PROXY TCP4 {client} 127.0.0.1 {port} 2222\r\n").into_bytes()
}

/// PROXY, TCP over IPv4, with a unique id and an authority.
fn v2(client: Ipv4Addr, port: u16) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(client.octets());
    body.extend(Ipv4Addr::LOCALHOST.octets());
    body.extend(port.to_be_bytes());
    body.extend(2222u16.to_be_bytes());
    for (kind, value) in [(5u8, &b"req-42"[..]), (2, b"www.example.org")] {
        body.push(kind);
        body.extend((value.len() as u16).to_be_bytes());
        body.extend(value);
    }
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11".to_vec();
    header.extend((body.len() as u16).to_be_bytes());
    header.extend(body);
    header
}

fn assert_closed(stream: &mut impl Read) {
    let mut rest = Vec::new();
    // a reset is an end as well
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.is_empty(), "{:?}", String::from_utf8_lossy(&rest));
}

#[test]
fn status_counts_what_happened() {
    let lab = Lab::new();
    let _relay = lab.run("");
    let web = lab.web();
    assert_eq!(web["state"], "running");
    assert_eq!(web["pathway"]["state"], "in-place");
    assert_eq!(web["pathway"]["name"], "vps01");
    assert_eq!(web["listen"], RELAY);
    assert_eq!(web["totals"]["accepted"], 0);

    let open = lab.client(&v1("192.0.2.7", 40_000), "hello");
    drop(lab.client(&v1("192.0.2.8", 40_000), "you"));
    lab.nonsense();
    wait_for("the second connection's end", || {
        lab.web()["totals"]["active"] == 1
    });
    let totals = &lab.web()["totals"];
    assert_eq!(totals["accepted"], 3);
    assert_eq!(totals["relayed"], 2);
    assert_eq!(totals["refused"]["no-header"], 1);
    // the first payload, which goes with the connect, is counted too
    assert_eq!(totals["bytes_to_target"], 8);
    assert_eq!(totals["bytes_to_client"], 8);
    let last = lab.web()["last_error"].clone();
    assert!(
        last["message"].as_str().unwrap().contains("an SSH banner"),
        "{last}"
    );

    let text = lab.text("status");
    assert!(text.starts_with("INSTANCE"), "{text}");
    assert!(text.contains("in place"), "{text}");
    let text = lab.text("status web");
    assert!(text.contains("1 no-header"), "{text}");
    drop(open);

    // another tool breaks the pathway: it is mended, and counted
    lab.host.ip("rule del priority 100");
    wait_for("status to notice", || {
        lab.web()["pathway"]["repairs"]["rule"] == 1
    });
    assert_eq!(lab.web()["pathway"]["state"], "in-place");
    let text = lab.text("status web");
    assert!(
        text.contains("in place, kept: 1 repairs (1 rule)"),
        "{text}"
    );

    let unknown = lab.ctl("status wbe");
    assert_eq!(unknown.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("there are web, spare"));
}

#[test]
fn status_says_why_an_instance_does_not_run() {
    let lab = Lab::new();
    let taken = lab
        .host
        .enter(|| TcpListener::bind("127.0.0.1:2223"))
        .expect("bind");
    let running = lab
        .host
        .spawn(lab.host.mmproxyctl("run --all --manage-pathways"));
    running.wait_log("INFO relaying instance=web");
    wait_for("the other one's failure", || {
        let status = lab.ctl("status spare --json");
        String::from_utf8_lossy(&status.stdout).contains("\"state\": \"waiting\"")
    });
    let text = lab.text("status");
    assert!(text.contains("spare: "), "{text}");
    assert!(text.contains("127.0.0.1:2223"), "{text}");
    drop(taken);
}

#[test]
fn status_says_what_a_pathway_lacks_that_nobody_keeps() {
    let lab = Lab::new();
    lab.text("pathway add 123");
    let running = lab.host.spawn(lab.host.mmproxyctl("run --all"));
    running.wait_log("INFO ready");
    assert_eq!(lab.web()["pathway"]["repairs"], Value::Null);
    lab.host.ip("rule del priority 100");
    wait_for("status to notice", || {
        lab.web()["pathway"]["state"] == "incomplete"
    });
    assert!(lab.text("status").contains("mmproxyctl pathway add 123"));
}

#[test]
fn nothing_runs_is_said() {
    let lab = Lab::new();
    for verb in ["status", "conns", "explain 192.0.2.7", "conns kill --all"] {
        let output = lab.ctl(verb);
        assert_eq!(output.status.code(), Some(1), "{verb}");
        assert!(
            String::from_utf8_lossy(&output.stderr).contains("nothing runs here"),
            "{verb}"
        );
    }
}

#[test]
fn connections_are_listed_filtered_and_sorted() {
    let lab = Lab::new();
    let _relay = lab.run("");
    let _first = lab.client(&v1("192.0.2.7", 40_000), "hello");
    let _second = lab.client(&v2(Ipv4Addr::new(203, 0, 113, 7), 40_001), "hello, hello");
    let mut silent = lab
        .host
        .enter(|| TcpStream::connect(RELAY))
        .expect("connect");
    wait_for("three connections", || lab.json("conns")["total"] == 3);

    let all = lab.json("conns --sort bytes");
    let stages: Vec<&str> = all["connections"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["stage"].as_str().unwrap())
        .collect();
    assert_eq!(stages, ["relaying", "relaying", "header"]);
    let row = &all["connections"][0];
    assert_eq!(row["client"], "203.0.113.7:40001");
    assert_eq!(row["local"], "203.0.113.7:40001");
    assert_eq!(row["target"], "127.0.0.1:22");
    assert_eq!(row["header"], 2);
    assert_eq!(row["unique_id"], "req-42");
    assert_eq!(row["authority"], "www.example.org");
    assert_eq!(
        (&row["bytes_to_target"], &row["bytes_to_client"]),
        (&12.into(), &12.into())
    );
    let local = silent.local_addr().expect("local address").to_string();
    assert_eq!(all["connections"][2]["proxy"], local.as_str());

    for (words, total) in [
        ("--client 203.0.113.0/24", 1),
        ("--client 192.0.2.7:40000", 1),
        ("--client 192.0.2.7:40001", 0),
        ("--proxy 127.0.0.0/8", 3),
        ("--proxy 10.0.0.0/8", 0),
        ("spare", 0),
        ("web --idle 1h", 0),
    ] {
        assert_eq!(
            lab.json(&format!("conns {words}"))["total"],
            total,
            "{words}"
        );
    }
    let limited = lab.json("conns --limit 1");
    assert_eq!(limited["total"], 3);
    assert_eq!(limited["connections"].as_array().unwrap().len(), 1);
    let text = lab.text("conns --client 203.0.113.7");
    assert!(text.contains("id req-42, for www.example.org"), "{text}");
    silent.write_all(b"x").expect("write");
}

#[test]
fn killed_connections_are_reset_and_others_are_not() {
    let lab = Lab::new();
    let relay = lab.run("-v");
    let mut victim = lab.client(&v1("192.0.2.7", 40_000), "hello");
    let mut other = lab.client(&v1("192.0.2.8", 40_000), "hello");
    let mut silent = lab
        .host
        .enter(|| TcpStream::connect(RELAY))
        .expect("connect");
    wait_for("three connections", || lab.json("conns")["total"] == 3);

    let refused = lab.ctl("conns kill");
    assert_eq!(refused.status.code(), Some(2), "nothing was named");
    let killed = lab.json("conns kill --client 192.0.2.7");
    assert_eq!(killed["total"], 1);
    let reset = victim.read(&mut [0; 1]).expect_err("a reset");
    assert_eq!(reset.kind(), std::io::ErrorKind::ConnectionReset);
    relay.wait_log("reason=\"killed\"");
    other.write_all(b"still").expect("write");
    other.read_exact(&mut [0; 5]).expect("read");
    // the service's side is gone as well: nothing of this client is left in the namespace
    wait_for("the spoofed socket to go", || {
        lab.host.run("ss -Htn src 192.0.2.7").is_empty()
    });
    assert_eq!(
        lab.ctl("conns kill --client 192.0.2.7").status.code(),
        Some(1)
    );
    assert_eq!(lab.json("conns kill --all")["total"], 2);
    assert_closed(&mut silent);
    assert_eq!(lab.web()["totals"]["killed"], 3);
    assert_eq!(lab.web()["totals"]["active"], 0);
}

#[test]
fn explain_knows_open_and_past_connections() {
    let lab = Lab::new();
    let _relay = lab.run("");
    let open = lab.client(&v2(Ipv4Addr::new(203, 0, 113, 7), 40_001), "hello");
    drop(lab.client(&v1("203.0.113.7", 50_000), "bye"));
    wait_for("the end of one", || {
        lab.json("explain 203.0.113.7")["ended"]
            .as_array()
            .is_some_and(|ended| ended.len() == 1)
    });
    let answer = lab.json("explain 203.0.113.7");
    assert_eq!(answer["open"][0]["client"], "203.0.113.7:40001");
    assert_eq!(answer["open"][0]["mark"], 123);
    let local = open.local_addr().expect("local address").to_string();
    assert_eq!(answer["open"][0]["proxy"], local.as_str());
    assert_eq!(answer["ended"][0]["client"], "203.0.113.7:50000");
    assert_eq!(answer["ended"][0]["ended"]["reason"], "closed");
    assert_eq!(answer["ended"][0]["bytes_to_client"], 3);
    let text = lab.text("explain 203.0.113.7:50000");
    assert!(text.contains("web, pathway mark 123"), "{text}");
    assert!(!text.contains("40001"), "{text}");
    assert_eq!(lab.ctl("explain 203.0.113.8").status.code(), Some(1));

    // a client whose service is down is explained as well
    let mut refused = lab
        .host
        .enter(|| TcpStream::connect("127.0.0.1:2223"))
        .expect("connect");
    refused.write_all(&v1("203.0.113.9", 1)).expect("write");
    assert_closed(&mut refused);
    let answer = lab.json("explain 203.0.113.9");
    assert_eq!(answer["ended"][0]["ended"]["reason"], "service-down");
}

#[test]
fn a_closed_connection_leaves_one_line() {
    let lab = Lab::new();
    let relay = lab.run("-v --log-format json");
    drop(lab.client(&v1("192.0.2.7", 40_000), "hello"));
    relay.wait_log("\"reason\":\"closed\"");
    let log = relay.log();
    let lines: Vec<Value> = log
        .lines()
        .filter(|line| line.contains("192.0.2.7"))
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(lines.len(), 1, "{log}");
    let line = &lines[0];
    assert_eq!(line["client.addr"], "192.0.2.7:40000");
    assert_eq!(line["target.addr"], "127.0.0.1:22");
    assert_eq!(
        (&line["bytes.in"], &line["bytes.out"]),
        (&5.into(), &5.into())
    );
    assert!(
        line["duration"].is_string() && line["proxy.addr"].is_string(),
        "{line}"
    );
}

#[test]
fn repeats_are_counted_instead_of_said() {
    let lab = Lab::new();
    let relay = lab.run("--workers 1");
    for _ in 0..30 {
        lab.nonsense();
    }
    // nothing follows: the rest is mentioned all the same, when the time is over
    wait_for_long("the rest to be mentioned", || {
        relay
            .log()
            .contains("and 25 more like it: refused: this is an SSH banner")
    });
    assert_eq!(relay.log().matches("sends no PROXY header").count(), 6);
    lab.nonsense();
    assert_eq!(lab.web()["totals"]["refused"]["no-header"], 31);
}

/// A window of warnings is ten seconds.
fn wait_for_long(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < end, "waited for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn what_is_no_request_is_closed_and_harms_nobody() {
    let lab = Lab::new();
    let _relay = lab.run("");
    let mut open = lab.client(&v1("192.0.2.7", 40_000), "hello");
    let path = lab.control_socket();
    let connect = || {
        let stream = UnixStream::connect(&path).expect("connect");
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .expect("time limit");
        stream
    };
    // one that never ends its line must keep nobody from being answered
    let mut slow: Vec<UnixStream> = (0..20).map(|_| connect()).collect();
    for stream in &mut slow {
        stream.write_all(b"{\"command\":\"sta").expect("write");
    }
    let oversized = [
        b"{\"command\":\"status\",\"x\":\"".to_vec(),
        vec![b'a'; 1 << 20],
    ]
    .concat();
    let deep = [vec![b'['; 50_000], b"\n".to_vec()].concat();
    let bad: [&[u8]; 9] = [
        b"\n",
        b"\0\xff\xfe\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"{\"command\":\"conns-kill\",\"filter\":{\"cleint\":\"::/0\"}}\n",
        b"{\"command\":\"conns\",\"limit\":-1}\n",
        b"{\"command\":\"explain\",\"filter\":{\"client\":\"everyone\"}}\n",
        b"{\"command\":\"status\"} {\"command\":\"status\"}\n",
        &deep,
        &oversized,
    ];
    for bytes in bad {
        let mut stream = connect();
        // closed in the midst of it: that is the point
        let _ = stream.write_all(bytes);
        assert_closed(&mut stream);
    }
    // thousands of them, gone as fast as they come
    for _ in 0..2_000 {
        let _ = connect().write_all(b"nonsense\n");
    }
    assert_eq!(
        lab.json("conns")["total"],
        1,
        "a killing filter with a typing error kills nobody"
    );
    open.write_all(b"still").expect("write");
    open.read_exact(&mut [0; 5]).expect("read");
    let answered: SocketAddr = RELAY.parse().expect("an address");
    assert_eq!(lab.web()["listen"], answered.to_string());
    drop(slow);
}

#[test]
fn another_user_is_not_answered() {
    let lab = Lab::new();
    let _relay = lab.run("");
    let path = lab.control_socket();
    // the mode keeps others out; with the mode opened it is the credentials
    let ask = |path: &str| {
        let mut command = lab.host.command("setpriv");
        command.args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "socat",
            "-t2",
            "-",
        ]);
        command.arg(format!("UNIX-CONNECT:{path}"));
        command.stdin(std::process::Stdio::piped());
        command.stdout(std::process::Stdio::piped());
        command.stderr(std::process::Stdio::piped());
        let mut child = command.spawn().expect("setpriv: install util-linux");
        let mut input = child.stdin.take().expect("stdin");
        let _ = input.write_all(b"{\"command\":\"status\"}\n");
        drop(input);
        child.wait_with_output().expect("socat")
    };
    let open_up = |path: &std::path::Path, mode| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("chmod");
    };
    open_up(lab.host.dir(), 0o755);
    let shown = path.to_str().expect("UTF-8");
    assert!(String::from_utf8_lossy(&ask(shown).stderr).contains("Permission denied"));
    open_up(&path, 0o666);
    let answer = ask(shown);
    assert!(
        answer.stdout.is_empty(),
        "{}",
        String::from_utf8_lossy(&answer.stdout)
    );
    assert_eq!(lab.web()["state"], "running");
}
