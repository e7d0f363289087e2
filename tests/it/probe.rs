//! `mmproxyctl probe` against HAProxy as the receiver, and against peers that misbehave.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use crate::support::net::{Host, Running, wait_for};

/// Runs `probe` with these bytes on stdin.
fn probe(host: &Host, words: &str, stdin: &[u8]) -> Output {
    let mut child = host
        .mmproxyctl(&format!("probe {words}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start mmproxyctl");
    let mut pipe = child.stdin.take().expect("a pipe");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // a probe that fails early has closed the pipe
            let _ = pipe.write_all(stdin);
        });
        child.wait_with_output().expect("wait for mmproxyctl")
    })
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn assert_fails(output: &Output, code: i32, sentence: &str) {
    assert_eq!(output.status.code(), Some(code), "{}", stderr(output));
    assert!(stderr(output).contains(sentence), "{}", stderr(output));
}

/// HAProxy on port 80 that wants a PROXY header and answers with what it read in it.
fn haproxy(host: &Host) -> Running {
    let config = host.write(
        "haproxy.cfg",
        r#"
defaults
    mode http
    timeout connect 5s
    timeout client 5s
    timeout server 5s
frontend told
    bind 127.0.0.1:80 accept-proxy
    bind [::1]:80 accept-proxy
    http-request return status 200 content-type text/plain lf-string "[%[src]]:%[src_port] to [%[dst]]:%[dst_port] authority=%[fc_pp_authority] id=%[fc_pp_unique_id]."
"#,
    );
    let mut command = host.command("haproxy");
    command.arg("-db").arg("-f").arg(config);
    let running = host.spawn(command);
    host.wait_listening(80);
    running
}

const REQUEST: &[u8] = b"GET / HTTP/1.0\r\n\r\n";

#[test]
fn haproxy_reads_what_is_sent() {
    let host = Host::new("wks01");
    let _haproxy = haproxy(&host);
    for (words, told) in [
        (
            "127.0.0.1:80 --client 192.0.2.7:4711 --version 1",
            "[192.0.2.7]:4711 to [127.0.0.1]:80 authority= id=.",
        ),
        (
            "127.0.0.1:80 --client 192.0.2.7:4711 --destination 198.51.100.3:443",
            "[192.0.2.7]:4711 to [198.51.100.3]:443 authority= id=.",
        ),
        (
            "[::1]:80 --client [2001:db8::7]:4711 --version 1",
            "[2001:db8::7]:4711 to [::1]:80 authority= id=.",
        ),
        (
            "127.0.0.1:80 --client [2001:db8::7]:4711 --crc32c",
            "[2001:db8::7]:4711 to [2001:db8::1]:80 authority= id=.",
        ),
        (
            "127.0.0.1:80 --client 192.0.2.7:4711 --tlv authority=example.org --tlv unique-id=A-42 --crc32c",
            "[192.0.2.7]:4711 to [127.0.0.1]:80 authority=example.org id=A-42.",
        ),
        (
            "127.0.0.1:80 --client 192.0.2.7:4711 --tlv 0x02=61 --tlv 5=62",
            "[192.0.2.7]:4711 to [127.0.0.1]:80 authority=a id=b.",
        ),
        ("127.0.0.1:80 --source 127.0.0.5 --local", "[127.0.0.5]:"),
        ("127.0.0.1:80 --source 127.0.0.6 --unknown", "[127.0.0.6]:"),
        // not --unspec: HAProxy 2.6 resets PROXY with family UNSPEC
    ] {
        let output = probe(&host, words, REQUEST);
        assert_eq!(
            output.status.code(),
            Some(0),
            "{words}: {}",
            stderr(&output)
        );
        assert!(
            stdout(&output).contains(told),
            "{words}: {}",
            stdout(&output)
        );
    }
}

#[test]
fn haproxy_refuses_what_is_spoiled() {
    let host = Host::new("wks01");
    let _haproxy = haproxy(&host);
    for how in [
        "missing",
        "truncated",
        "bad-signature",
        "bad-address",
        // not bad-port: HAProxy 2.6 takes 65536
        "bad-end",
        "bad-version",
        "bad-command",
        "short-length",
        "truncated-tlv",
        "bad-crc",
        "bad-family --version 1",
        "oversized-length",
    ] {
        let words = format!("127.0.0.1:80 --client 192.0.2.7:1 --timeout 500ms --corrupt {how}");
        let output = probe(&host, &words, REQUEST);
        assert!(
            !stdout(&output).contains("192.0.2.7"),
            "{how}: {}",
            stdout(&output)
        );
        assert_ne!(output.status.code(), Some(2), "{how}: {}", stderr(&output));
    }
    // HAProxy lives, and the same header unspoiled is taken
    let output = probe(&host, "127.0.0.1:80 --client 192.0.2.7:1 --crc32c", REQUEST);
    assert!(
        stdout(&output).contains("[192.0.2.7]:1 to"),
        "{}",
        stdout(&output)
    );
}

/// A listener on port 7 inside the host, and what happens to its one connection.
fn serve(
    host: &Host,
    serve: impl FnOnce(TcpStream) + Send + 'static,
) -> std::thread::JoinHandle<()> {
    // a child that another test is forking just now holds the last listener until it execs
    let mut bound = None;
    wait_for("the port", || {
        bound = host.enter(|| TcpListener::bind("[::]:7")).ok();
        bound.is_some()
    });
    let listener = bound.expect("bound");
    std::thread::spawn(move || serve(listener.accept().expect("accept").0))
}

#[test]
fn pieces_are_segments_of_their_own() {
    let host = Host::new("wks01");
    let inside = host.clone();
    let served = serve(&host, move |mut stream| {
        let mut header = [0; 28];
        stream.read_exact(&mut header).expect("the header");
        assert_eq!(&header[..4], b"\r\n\r\n");
        let seen = inside.run("ss -Htin sport = :7");
        // the end of what is sent counts as one, where it is there already
        let counted = [" data_segs_in:28 ", " data_segs_in:29 "];
        assert!(counted.iter().any(|count| seen.contains(count)), "{seen}");
        stream.write_all(b"thanks").expect("answer");
    });
    let output = probe(
        &host,
        "127.0.0.1:7 --client 192.0.2.7:1 --split 28 --split-delay 2ms",
        b"",
    );
    served.join().expect("28 segments");
    assert_eq!(stdout(&output), "thanks");
}

#[test]
fn both_directions_end_on_their_own() {
    let host = Host::new("wks01");
    let sent: Vec<u8> = (0..3_000_000u32).map(|number| (number / 3) as u8).collect();
    let expected = sent.clone();
    let served = serve(&host, move |mut stream| {
        let mut header = [0; 15];
        stream.read_exact(&mut header).expect("the header");
        assert_eq!(&header, b"PROXY UNKNOWN\r\n");
        let mut received = Vec::new();
        // ends with the probe's stdin, while the answer is still to come
        stream.read_to_end(&mut received).expect("payload");
        assert!(received == expected, "{} bytes", received.len());
        received.reverse();
        stream.write_all(&received).expect("answer");
    });
    let output = probe(&host, "[::1]:7 --unknown", &sent);
    served.join().expect("payload as sent");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(output.stdout.iter().eq(sent.iter().rev()));
}

#[test]
fn ends_with_the_other_end_while_stdin_is_open() {
    let host = Host::new("wks01");
    let served = serve(&host, |mut stream| {
        stream.read_exact(&mut [0; 16]).expect("the header");
        stream.write_all(b"bye").expect("answer");
    });
    let mut child = host
        .mmproxyctl("probe 127.0.0.1:7 --local")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start mmproxyctl");
    let open = child.stdin.take();
    let mut said = String::new();
    let mut pipe = child.stdout.take().expect("a pipe");
    pipe.read_to_string(&mut said).expect("output");
    assert_eq!(said, "bye");
    assert_eq!(child.wait().expect("wait").code(), Some(0));
    drop(open);
    served.join().expect("served");
}

#[test]
fn failures_are_told_apart() {
    let host = Host::new("wks01");
    let run = |words: &str| probe(&host, words, b"");

    assert_fails(
        &run("127.0.0.1:7 --local"),
        1,
        "127.0.0.1:7 refused the connection",
    );

    host.run("iptables -A INPUT -p tcp --dport 9 -j DROP");
    assert_fails(
        &run("127.0.0.1:9 --local --timeout 200ms"),
        1,
        "did not take the connection within 200ms",
    );

    let (silent, wait) = std::sync::mpsc::channel::<()>();
    let served = serve(&host, move |stream| {
        // held open until the probe has given up
        let _ = wait.recv_timeout(Duration::from_secs(10));
        drop(stream);
    });
    let start = Instant::now();
    assert_fails(
        &run("127.0.0.1:7 --local --timeout 300ms"),
        1,
        "no answer from 127.0.0.1:7 within 300ms",
    );
    assert!(start.elapsed() >= Duration::from_millis(300));
    drop(silent);
    served.join().expect("served");

    let served = serve(&host, |mut stream| {
        // closed with bytes unread: the kernel sends a reset
        stream.read_exact(&mut [0; 1]).expect("one byte");
    });
    assert_fails(
        &run("127.0.0.1:7 --local"),
        1,
        "reset the connection before it sent a byte",
    );
    served.join().expect("served");

    let served = serve(&host, |mut stream| {
        stream
            .read_to_end(&mut Vec::new())
            .expect("the header and the end");
    });
    let output = run("127.0.0.1:7 --local");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("closed without a byte"),
        "{}",
        stderr(&output)
    );
    served.join().expect("served");

    assert_fails(
        &run("127.0.0.1:7 --local --source 192.0.2.99"),
        1,
        "cannot connect from 192.0.2.99",
    );
}

#[test]
fn mistakes_are_usage_errors() {
    let host = Host::new("wks01");
    for (words, sentence) in [
        ("127.0.0.1:7", "--client <ADDR:PORT>"),
        (
            "127.0.0.1:7 --client 192.0.2.7:1 --destination [::1]:2",
            "not of one family",
        ),
        ("127.0.0.1:7 --local --source ::1", "not of one family"),
        (
            "127.0.0.1:7 --local --split 17",
            "a header of 16 bytes has no 17 pieces",
        ),
        ("127.0.0.1:7 --local --split 0", "--split"),
        ("127.0.0.1:7 --local --timeout 5", "has no unit"),
    ] {
        assert_fails(&probe(&host, words, b""), 2, sentence);
    }
    let help = probe(&host, "--help", b"");
    assert!(stdout(&help).contains("Examples:"), "{}", stdout(&help));
}

/// A probe whose reader has seen enough (`| head -1`) ends in peace.
#[test]
fn a_closed_stdout_is_no_failure() {
    let host = Host::new("wks01");
    let served = serve(&host, |mut stream| {
        // until the probe is gone
        while stream.write_all(&[b'x'; 4096]).is_ok() {}
    });
    let mut child = host
        .mmproxyctl("probe 127.0.0.1:7 --local")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start mmproxyctl");
    drop(child.stdout.take());
    wait_for("the probe's end", || {
        child.try_wait().expect("wait").is_some()
    });
    assert_eq!(child.wait().expect("wait").code(), Some(0));
    served.join().expect("served");
}
