//! Unix-socket listeners: a real HAProxy in front of them, who may open them, and what becomes of the file.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Pid, Uid, setfsgid, setfsuid};

use super::{Rig, relayed};
use crate::relay::lab::{SOON, announce, exchange};
use crate::support::net::wait_for;

/// nobody.
const STRANGER: u32 = 65_534;

impl Rig {
    /// With one instance, `web`, on a socket with these options.
    fn on_a_socket(options: &str) -> (Self, PathBuf) {
        let rig = Self::new();
        let path = rig.wks.dir().join("web.sock");
        rig.on(&path, options);
        (rig, path)
    }

    fn on(&self, path: &std::path::Path, options: &str) {
        let port = self.service.addr.port();
        self.instances(&format!(
            "web\t123\tunix:{}\t127.0.0.1\t{port}\t::1\t{options}\n",
            path.display()
        ));
    }
}

fn dial(path: &PathBuf) -> UnixStream {
    let stream = UnixStream::connect(path).expect("connect to the socket");
    stream.set_read_timeout(Some(SOON)).expect("read timeout");
    stream
}

/// Sends a megabyte to the echo service and takes it back, then does what is left to do.
fn bulk<'s, S>(stream: &'s S, then: impl FnOnce(&'s S))
where
    S: Sync,
    &'s S: Read + Write,
{
    let sent = vec![7; 1 << 20];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = stream;
            stream.write_all(&sent).expect("send");
        });
        let mut answer = vec![0; sent.len()];
        let mut stream = stream;
        stream.read_exact(&mut answer).expect("receive");
        assert!(answer == sent, "other bytes came back");
    });
    then(stream);
}

/// Whether a process has the socket that accepts at this path.
fn listens(pid: Pid, path: &Path) -> bool {
    const ACCEPTS: &str = "00010000"; // __SO_ACCEPTCON of Linux' include/linux/net.h
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/unix")).expect("the sockets");
    let sockets = table
        .lines()
        .map(|line| line.split(' ').filter(|word| !word.is_empty()));
    let mut links = sockets.filter_map(|mut words| {
        let flags = words.nth(3)?;
        let inode = words.nth(2)?;
        let at = words.next()?;
        (flags == ACCEPTS && Path::new(at) == path).then(|| format!("socket:[{inode}]"))
    });
    let link = links.next().expect("somebody listens");
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("the descriptors");
    descriptors
        .filter_map(|descriptor| std::fs::read_link(descriptor.ok()?.path()).ok())
        .any(|to| to == Path::new(&link))
}

/// A connection through the socket whose client the service sees.
fn connect(rig: &Rig, path: &PathBuf, client: &str) -> UnixStream {
    let mut stream = dial(path);
    relayed(&mut stream, &announce(client));
    let service = if client.starts_with('[') {
        &rig.service6
    } else {
        &rig.service
    };
    assert_eq!(service.peer(), super::addr(client));
    stream
}

#[test]
fn the_service_sees_the_clients_of_a_haproxy_on_the_same_host() {
    let (rig, path) = Rig::on_a_socket("");
    let _relay = rig.run();
    let config = rig.wks.write(
        "haproxy.cfg",
        format!(
            "defaults\n mode tcp\n timeout connect 5s\n timeout client 10s\n timeout server 10s\n\
             listen web\n bind 10.0.0.1:8022\n bind [fd00::1]:8022\n \
             server relay unix@{} send-proxy-v2\n",
            path.display()
        ),
    );
    let mut command = rig.wks.command("haproxy");
    command.arg("-db").arg("-f").arg(config);
    let haproxy = rig.wks.spawn(command);
    rig.wks.wait_listening(8022);
    for (at, service) in [
        ("10.0.0.1:8022", &rig.service),
        ("[fd00::1]:8022", &rig.service6),
    ] {
        let at = super::addr(at);
        let mut client = rig
            .vps
            .enter(|| TcpStream::connect_timeout(&at, SOON))
            .expect("connect to haproxy");
        client.set_read_timeout(Some(SOON)).expect("read timeout");
        exchange(&mut client, b"hello through two sockets");
        assert_eq!(service.peer(), client.local_addr().expect("an address"));
        let proxy = format!("unix:{}", haproxy.pid());
        let conns = rig.conns();
        let mine = conns.iter().find(|one| one["proxy"] == *proxy);
        let mine = mine.unwrap_or_else(|| panic!("{proxy} in {conns:#?}"));
        assert_eq!(mine["client"], *client.local_addr().unwrap().to_string());
        assert_eq!(mine.get("port"), None);
        // no half-close here: while data is on its way, HAProxy 2.6 now and then shuts a Unix server's
        // direction before it has passed all of it on
        bulk(&client, |_| {});
    }
    let stream = connect(&rig, &path, "192.0.2.7:4000");
    bulk(&stream, |stream| {
        stream
            .shutdown(std::net::Shutdown::Write)
            .expect("shutdown");
        let mut stream = stream;
        assert_eq!(stream.read(&mut [0; 8]).expect("the end"), 0);
    });
    // the proxy's address is no address: nothing that is in allow.txt
    assert!(
        rig.said("conns --proxy 10.0.0.2")
            .contains("no such connection")
    );
}

#[test]
fn the_permissions_of_the_file_say_who_is_believed() {
    let (rig, path) = Rig::on_a_socket("socket-mode=0620,socket-owner=root:65534");
    // the test's own directory keeps everybody out
    let all = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(rig.wks.dir(), all).expect("open the directory");
    let _relay = rig.run();
    let file = std::fs::symlink_metadata(&path).expect("the socket's file");
    assert!(file.file_type().is_socket());
    assert_eq!((file.mode() & 0o7777, file.gid()), (0o620, STRANGER));
    let as_user = |user: u32, group: u32| {
        let path = path.clone();
        std::thread::spawn(move || {
            setfsgid(Gid::from_raw(group));
            setfsuid(Uid::from_raw(user));
            UnixStream::connect(path).map(|_| ())
        })
        .join()
        .expect("thread")
    };
    let stranger = as_user(STRANGER, STRANGER - 1).expect_err("a stranger");
    assert_eq!(stranger.raw_os_error(), Some(Errno::EACCES as i32));
    as_user(STRANGER, STRANGER).expect("a member of the group");
    // from here on everybody may, on the same socket: nothing that is open is lost
    let mut open = connect(&rig, &path, "192.0.2.7:4000");
    rig.on(&path, "socket-mode=0666");
    rig.said("reload");
    as_user(STRANGER, STRANGER - 1).expect("everybody");
    relayed(&mut open, b"");
    connect(&rig, &path, "[2001:db8::7]:4000");
}

#[test]
fn a_dead_process_leaves_nothing_in_the_way() {
    let (rig, path) = Rig::on_a_socket("");
    let mut first = rig.run();
    connect(&rig, &path, "192.0.2.7:4000");
    first.signal(Signal::SIGKILL);
    first.wait(SOON);
    assert!(path.exists(), "the file is left behind");
    let mut second = rig.run();
    connect(&rig, &path, "192.0.2.7:4001");
    second.signal(Signal::SIGTERM);
    assert!(second.wait(SOON).success());
    assert!(!path.exists(), "the file goes with the process");
    // somebody else's socket, and what is no socket at all, are left alone
    let theirs = std::os::unix::net::UnixListener::bind(&path).expect("bind");
    let output = rig.ctl("run --all --no-check");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("Address already in use"), "{said}");
    drop(theirs);
    std::fs::remove_file(&path).expect("remove");
    std::fs::write(&path, "precious").expect("write");
    let output = rig.ctl("run --all --no-check");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("which is no socket"), "{said}");
    assert_eq!(std::fs::read_to_string(&path).expect("read"), "precious");
}

#[test]
fn the_socket_goes_to_the_successor_and_to_the_next_configuration() {
    let (rig, path) = Rig::on_a_socket("");
    let mut first = rig.run();
    let inode = || std::fs::metadata(&path).expect("the file").ino();
    let made = inode();
    let mut open = connect(&rig, &path, "192.0.2.7:4000");
    rig.said("upgrade");
    assert_eq!(inode(), made, "the same file");
    first.wait_log("handed over");
    // until then both accept
    wait_for("the old process to give the socket up", || {
        !listens(first.pid(), &path)
    });
    let mut new = connect(&rig, &path, "192.0.2.7:4001");
    relayed(&mut open, b"");
    drop(open);
    assert!(first.wait(SOON).success());
    assert_eq!(inode(), made, "the old process leaves it alone");
    relayed(&mut new, b"");
    // an instance that goes takes its file along
    let other = rig.wks.dir().join("other.sock");
    rig.on(&other, "");
    rig.said("reload");
    assert!(!path.exists());
    connect(&rig, &other, "192.0.2.7:4002");
    let status: serde_json::Value = serde_json::from_str(&rig.said("status --json")).expect("JSON");
    let listen = format!("unix:{}", other.display());
    assert_eq!(status[0]["instances"][0]["listen"], *listen, "{status:#}");
    let pid = status[0]["pid"].as_i64().expect("the successor's pid");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).expect("a pid"));
    nix::sys::signal::kill(pid, Signal::SIGTERM).expect("stop the successor");
    wait_for("the file to go", || !other.exists());
}

#[test]
fn a_health_check_without_a_client_is_no_warning() {
    let (rig, path) = Rig::on_a_socket("");
    let relay = rig.run();
    for header in [&b"PROXY UNKNOWN\r\n"[..], b""] {
        let mut stream = dial(&path);
        stream.write_all(header).expect("send");
        stream
            .shutdown(std::net::Shutdown::Write)
            .expect("shutdown");
        let _ = stream.read(&mut [0; 8]);
    }
    // what is no header is said, with who sent it
    let mut stream = dial(&path);
    stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").expect("send");
    let _ = stream.read(&mut [0; 8]);
    relay.wait_log("this is an SSH banner");
    relay.wait_log(&format!("proxy.addr=unix:{}", std::process::id()));
    let log = relay.log();
    assert_eq!(log.matches("WARN").count(), 1, "{log}");
    let metrics = rig.said("status web");
    assert!(metrics.contains("2 empty (health checks)"), "{metrics}");
}
