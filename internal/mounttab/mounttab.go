// Package mounttab reads the kernel's table of mounts.
//
// Design note. It asks /proc/self/mountinfo and never the mount point itself,
// so that it also answers for a FUSE mount whose server is dead or hangs.
package mounttab

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Mount is one line of the table.
type Mount struct {
	Dev     string // "major:minor" of the filesystem
	Dir     string // mount point
	Type    string // filesystem type, such as fuse.mount-image
	Source  string // device or image
	Options string // of the filesystem, not of the mount point
}

// Option returns the value of an option of the filesystem.
func (m Mount) Option(name string) (value string, ok bool) {
	for opt := range strings.SplitSeq(m.Options, ",") {
		if k, v, _ := strings.Cut(opt, "="); k == name {
			return v, true
		}
	}
	return "", false
}

// Read returns the mounts that this process sees, in the order of mounting.
func Read() ([]Mount, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parse(f)
}

// parse reads the format of proc_pid_mountinfo(5).
func parse(r io.Reader) ([]Mount, error) {
	var mounts []Mount
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		head, tail, ok := strings.Cut(lines.Text(), " - ")
		// A source may be empty, so blanks count in the tail.
		h, t := strings.Fields(head), strings.Split(tail, " ")
		if !ok || len(h) < 6 || len(t) < 3 {
			return nil, fmt.Errorf("mountinfo: unknown line %q", lines.Text())
		}
		mounts = append(mounts, Mount{
			Dev: h[2], Dir: unescape(h[4]), Type: t[0], Source: unescape(t[1]), Options: t[2],
		})
	}
	return mounts, lines.Err()
}

// unescape undoes the octal escapes of blanks and backslashes.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// Find returns what is mounted on dir (the topmost, if several are), and
// whether anything is. dir should come from Resolve.
func Find(dir string) (Mount, bool, error) {
	mounts, err := Read()
	if err != nil {
		return Mount{}, false, err
	}
	for i := len(mounts) - 1; i >= 0; i-- {
		if mounts[i].Dir == dir {
			return mounts[i], true, nil
		}
	}
	return Mount{}, false, nil
}

// Resolve makes dir absolute and free of symbolic links, as the table has it.
// A mount point whose server is dead cannot be looked at; then only what leads
// to it is resolved.
func Resolve(dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if real, err := filepath.EvalSymlinks(abs); err == nil {
		return real, nil
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return "", err
	}
	return filepath.Join(parent, filepath.Base(abs)), nil
}
