//! Ten thousand connections over a hundred reloads: `./tests/run.sh --soak`.
//!
//! Two processes hold five thousand each: a relayed connection takes two descriptors, and where even
//! root may not have more than 20,000 in a process (containers), one could not hold them all.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::net::{Host, Running};

const EACH: u16 = 5_000;
const RELOADS: usize = 100;
/// The instances' listen ports.
const PORTS: [u16; 2] = [2001, 2002];

/// Connects as the proxy does.
fn open(port: u16, client_port: u16) -> std::io::Result<TcpStream> {
    let addr = (IpAddr::V4(Ipv4Addr::LOCALHOST), port).into();
    let mut stream = TcpStream::connect_timeout(&addr, Duration::from_secs(10))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    write!(
        stream,
        "PROXY TCP4 192.0.2.7 127.0.0.1 {client_port} {port}\r\n"
    )?;
    Ok(stream)
}

/// One request over a connection that is kept, answered with the client's port as nginx sees it.
fn request(stream: &mut TcpStream) -> std::io::Result<String> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: wks01\r\n\r\n")?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"~") {
        let mut some = [0; 512];
        match stream.read(&mut some)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            length => answer.extend_from_slice(&some[..length]),
        }
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// nginx that keeps connections open, on two ports so that an instance can go from one to the other.
fn nginx(host: &Host) -> Running {
    let config = host.write(
        "nginx.conf",
        format!(
            "user root; pid {}/nginx.pid; error_log stderr; worker_processes 2;\n\
             worker_rlimit_nofile 20000; events {{ worker_connections 15000; }}\n\
             http {{ access_log off; keepalive_timeout 1h; keepalive_requests 1000000;\n\
             server {{ listen 127.0.0.1:9001 reuseport; listen 127.0.0.1:9002 reuseport;\n\
             location / {{ return 200 '$remote_addr $remote_port~'; }} }} }}\n",
            host.dir().display(),
        ),
    );
    let mut command = host.command("nginx");
    command
        .args(["-e", "stderr", "-g", "daemon off;", "-c"])
        .arg(config);
    let running = host.spawn(command);
    host.wait_listening(9002);
    running
}

fn write_instances(host: &Host, target: u16, more: &str) {
    let lines: Vec<String> = ["a", "b"]
        .iter()
        .zip(PORTS)
        .map(|(name, port)| {
            format!("{name}\t123\t127.0.0.1:{port}\t127.0.0.1\t{target}\t-{more}\n")
        })
        .collect();
    host.write("etc/instances.tsv", lines.concat());
}

#[test]
fn ten_thousand_connections_over_a_hundred_reloads() {
    let host = Host::new("wks01");
    // loopback has room for both ends of all of them
    host.sysctl("net.ipv4.ip_local_port_range", "1024 65000");
    host.write("etc/pathways.conf", "123\n");
    host.write("etc/allow.txt", "127.0.0.1\n");
    write_instances(&host, 9001, "");
    let _nginx = nginx(&host);
    let added = host
        .mmproxyctl("pathway add-all")
        .status()
        .expect("mmproxyctl");
    assert!(added.success());
    let relays = ["a", "b"].map(|name| {
        let running = host.spawn(host.mmproxyctl(&format!("run {name}")));
        running.wait_log("INFO ready");
        running
    });

    let mut held: Vec<(u16, TcpStream)> = host.enter(|| {
        PORTS
            .iter()
            .flat_map(|&port| (0..EACH).map(move |number| (port, 10_000 + number)))
            .map(|(port, client_port)| {
                // the same client on both: the second keeps the address and gets another port
                let mut stream = open(port, client_port).expect("connect");
                let answer = request(&mut stream).expect("an answer");
                assert!(answer.contains("192.0.2.7 "), "{answer}");
                (client_port, stream)
            })
            .collect()
    });
    let resident = |relay: &Running| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", relay.pid()));
        let status = status.expect("status");
        let line = status.lines().find(|line| line.starts_with("VmRSS"));
        line.expect("VmRSS").to_owned()
    };
    println!(
        "{} connections, {:?}",
        held.len(),
        relays.each_ref().map(resident)
    );

    let stop = AtomicBool::new(false);
    let served = std::thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            host.enter(|| {
                for (served, port) in PORTS.into_iter().cycle().enumerate() {
                    if stop.load(Ordering::Relaxed) {
                        return Ok(served);
                    }
                    let client_port = 40_000 + u16::try_from(served % 20_000).expect("small");
                    let outcome = open(port, client_port).and_then(|mut new| request(&mut new));
                    outcome.map_err(|error| format!("new connection {served}: {error}"))?;
                }
                Err("no port".to_owned())
            })
        });
        for number in 0..RELOADS {
            match number % 3 {
                0 => write_instances(&host, 9002, ""),
                1 => write_instances(&host, 9001, "\theader-timeout=10s"),
                _ => {
                    host.write("etc/allow.txt", format!("127.0.0.1\n10.0.0.{number}\n"));
                }
            }
            let output = host.mmproxyctl("reload").output().expect("mmproxyctl");
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{output:?}");
            assert_eq!(said.matches("unchanged: 0").count(), 2, "{number}: {said}");
            assert!(
                !traffic.is_finished(),
                "new connections failed at reload {number}"
            );
        }
        stop.store(true, Ordering::Relaxed);
        traffic
            .join()
            .expect("traffic")
            .expect("every new connection is served")
    });
    println!("{RELOADS} reloads, {served} new connections meanwhile");
    for (client_port, stream) in &mut held {
        let answer = request(stream);
        assert!(answer.is_ok(), "client port {client_port}: {answer:?}");
    }
    println!(
        "{} connections are still there, {:?}",
        held.len(),
        relays.each_ref().map(resident)
    );
}
