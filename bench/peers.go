package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Names of those who compete.
const (
	peerOurs = "imagestack"
	peerQSD  = "qemu-storage-daemon"
	peerBare = "bare file"
)

// startLimit is how long a server may take until its file answers; stopLimit,
// until it has gone after being told to.
const (
	startLimit = 20 * time.Second
	stopLimit  = 60 * time.Second
)

// servers starts those who show an image as a raw file.
type servers struct {
	dir        string // for mount points
	mountImage string // binary
	transport  string // its --transport
	cleanup    *cleaner
	n          int // mount points made
}

// server shows one image. That of the bare file is no process.
type server struct {
	peer string
	file string   // the virtual disk
	argv []string // command that shows it, nil for the bare file
	loop string   // the loop device that the server has attached, if any
	pid  int      // 0 for the bare file
	end  func() error
}

// start shows img until stop.
// With loop ours attaches a loop device by itself.
func (s *servers) start(ctx context.Context, peer string, img *image, writable, loop bool) (*server, error) {
	var srv *server
	var err error
	switch peer {
	case peerOurs:
		srv, err = s.ours(ctx, img, writable, loop)
	case peerQSD:
		srv, err = s.qsd(ctx, img, writable)
	case peerBare:
		srv = &server{peer: peer, file: img.top(), end: func() error { return nil }}
	default:
		err = errors.New("unknown")
	}
	if err != nil {
		return nil, fmt.Errorf("%s on %s: %w", peer, img.name, err)
	}
	return srv, nil
}

func (srv *server) stop() error { return srv.end() }

// mountImageArgs is the command line of mount-image without its mode.
func (s *servers) mountImageArgs(img *image, dir string, writable bool) []string {
	format := img.format
	if filepath.Ext(img.top()) == ".qcow2" {
		format = "qcow2" // of the top: an overlay may stand on another format
	}
	argv := []string{s.mountImage, "--format=" + format, "--transport=" + s.transport}
	if img.name == imgFlat {
		argv = append(argv, "--flat")
	}
	if writable {
		argv = append(argv, "-w")
	}
	return append(argv, img.top(), dir)
}

func (s *servers) ours(ctx context.Context, img *image, writable, loop bool) (*server, error) {
	s.n++
	dir := filepath.Join(s.dir, fmt.Sprintf("mount-%d", s.n))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	argv := s.mountImageArgs(img, dir, writable)
	argv = append(argv, "-f", "--json")
	if loop {
		argv = append(argv, "--loop")
	}
	srv := &server{peer: peerOurs, file: filepath.Join(dir, "disk.raw"), argv: argv}
	// It prints the announcement once the disk answers.
	ready := func(stdout []byte) bool {
		var a struct{ Loop string }
		if json.Unmarshal(stdout, &a) != nil {
			return false
		}
		srv.loop = a.Loop
		return true
	}
	return srv, s.launch(ctx, srv, dir, ready)
}

// qsdArgs is the command line of qemu-storage-daemon: every layer named with
// its driver, nothing probed.
func qsdArgs(img *image, mountpoint, pidfile string, writable bool) []string {
	argv := []string{"qemu-storage-daemon"}
	below := ""
	for i := len(img.layers) - 1; i >= 0; i-- {
		path := img.layers[i]
		driver := "qcow2"
		switch filepath.Ext(path) {
		case ".hds":
			driver = "parallels"
		case ".raw":
			driver = "raw"
		}
		file := fmt.Sprintf("driver=file,node-name=f%d,filename=%s", i, path)
		node := fmt.Sprintf("driver=%s,node-name=l%d,file=f%d", driver, i, i)
		if i == 0 && writable {
			file += ",discard=unmap"
			node += ",discard=unmap"
		} else {
			file += ",read-only=on"
			node += ",read-only=on"
		}
		if driver == "qcow2" { // the others have no parent
			node += ",backing=" + below
		}
		below = fmt.Sprintf("l%d", i)
		argv = append(argv, "--blockdev", file, "--blockdev", node)
	}
	export := "type=fuse,id=e,node-name=l0,mountpoint=" + mountpoint
	if writable {
		export += ",writable=on"
	}
	return append(argv, "--export", export, "--pidfile", pidfile)
}

func (s *servers) qsd(ctx context.Context, img *image, writable bool) (*server, error) {
	s.n++
	file := filepath.Join(s.dir, fmt.Sprintf("export-%d", s.n))
	pidfile := file + ".pid"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return nil, err
	}
	srv := &server{peer: peerQSD, file: file, argv: qsdArgs(img, file, pidfile, writable)}
	// It writes its pid once every export stands.
	ready := func([]byte) bool {
		b, err := os.ReadFile(pidfile)
		return err == nil && len(b) > 0
	}
	return srv, s.launch(ctx, srv, file, ready)
}

// launch starts a server in the foreground and waits until it is ready. What
// was started is ended by srv.end, or at the end of the program.
func (s *servers) launch(ctx context.Context, srv *server, mountpoint string, ready func(stdout []byte) bool) error {
	// Files and not pipes: nobody has to read them.
	out, err := os.Create(mountpoint + ".stdout")
	if err != nil {
		return err
	}
	defer out.Close()
	errs, err := os.Create(mountpoint + ".stderr")
	if err != nil {
		return err
	}
	defer errs.Close()
	cmd := exec.Command(srv.argv[0], srv.argv[1:]...)
	cmd.Stdout, cmd.Stderr = out, errs
	detach(cmd)
	if err := cmd.Start(); err != nil {
		return err
	}
	srv.pid = cmd.Process.Pid
	gone := make(chan struct{})
	var exit error
	go func() {
		exit = cmd.Wait()
		close(gone)
	}()
	srv.end = s.cleanup.add(func() error { return endServer(cmd.Process, gone, mountpoint) })

	said := func() string {
		b, _ := os.ReadFile(mountpoint + ".stderr")
		return lastLines(string(b), 3)
	}
	for limit := time.Now().Add(startLimit); ; {
		b, _ := os.ReadFile(mountpoint + ".stdout")
		if ready(b) {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), srv.end())
		case <-gone:
			return errors.Join(fmt.Errorf("it ended (%v): %s", exit, said()), srv.end())
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(limit) {
			return errors.Join(fmt.Errorf("not ready after %v: %s", startLimit, said()), srv.end())
		}
	}
}

// endServer tells a server to go, waits, and takes away what it leaves behind.
func endServer(p *os.Process, gone <-chan struct{}, mountpoint string) error {
	var errs error
	_ = p.Signal(unix.SIGTERM) // it may have gone
	select {
	case <-gone:
	case <-time.After(stopLimit):
		errs = fmt.Errorf("process %d has not ended in %v and was killed", p.Pid, stopLimit)
		_ = p.Kill()
		<-gone
	}
	detachMount(mountpoint)
	for _, f := range []string{mountpoint, mountpoint + ".pid", mountpoint + ".stdout", mountpoint + ".stderr"} {
		if err := os.Remove(f); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = errors.Join(errs, err)
		}
	}
	return errs
}

// detachMount takes away a mount that a server left behind; when there is none,
// both attempts fail and nothing happens.
func detachMount(mountpoint string) {
	if unix.Unmount(mountpoint, unix.MNT_DETACH) == nil || os.Geteuid() == 0 {
		return
	}
	_ = exec.Command("fusermount3", "-u", "-q", "-z", mountpoint).Run()
}

// detach keeps the signals of the terminal from a child, which this program
// ends in its own order, and ends it when this program dies.
func detach(cmd *exec.Cmd) {
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGTERM}
}

// loop is a loop device on a file.
type loop struct {
	device string
	argv   []string
	detach func() error
}

// attachLoop puts a loop device on a server's file; direct is whether it
// bypasses the page cache of that file.
func (s *servers) attachLoop(ctx context.Context, file string, readOnly, direct bool) (*loop, error) {
	argv := []string{"losetup", "--find", "--show"}
	if direct {
		argv = append(argv, "--direct-io=on")
	}
	if readOnly {
		argv = append(argv, "--read-only")
	}
	argv = append(argv, file)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	detach(cmd)
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, lastLines(string(exit.Stderr), 2))
		}
		return nil, fmt.Errorf("loop device: %w", err)
	}
	l := &loop{device: strings.TrimSpace(string(out)), argv: argv}
	record := filepath.Join(s.dir, loopRecord+filepath.Base(l.device))
	l.detach = s.cleanup.add(func() error {
		err := command(context.Background(), "losetup", "-d", l.device)
		if err == nil {
			err = os.Remove(record)
		}
		return err
	})
	if err := os.WriteFile(record, []byte(diskSequence(l.device)), 0o600); err != nil {
		return nil, errors.Join(err, l.detach())
	}
	b, err := os.ReadFile(sysfs(l.device, "loop/dio"))
	if got := strings.TrimSpace(string(b)); err == nil && direct && got != "1" {
		err = fmt.Errorf("loop device: the kernel refused direct I/O on %s", file)
	}
	if err != nil {
		return nil, errors.Join(err, l.detach())
	}
	return l, nil
}
