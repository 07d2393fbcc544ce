package crash

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/imagestack/imagestack/backend"
)

// traced are the system calls that change files and names, or move the offset
// of a write. The pairs of what strace says and what is done with it are in
// replayer.call; a call that is traced and not understood is an error, so that
// nothing is overlooked.
const traced = "open,openat,openat2,creat,close,dup,dup2,dup3,fcntl,lseek,write,writev,pwrite64,pwritev,pwritev2," +
	"ftruncate,truncate,fallocate,copy_file_range,sendfile,splice,fsync,fdatasync,sync,syncfs,sync_file_range," +
	"rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,link,linkat,symlink,symlinkat"

// Traced is what a process did to the files in one directory.
type Traced struct {
	Rec   *backend.Recorder
	Dir   *backend.Names
	Syncs []string // what each sync was of
	files int
}

// Trace runs a command and records what it does in dir, whose files must not
// be changed by anybody else. Programs of imagestack's own that work on names
// are watched so, without a seam in them.
func Trace(dir string, cmd *exec.Cmd) (*Traced, error) {
	r := &replayer{root: dir, fds: map[string]*openFile{}, now: map[string]backend.File{},
		out: &Traced{Rec: backend.NewRecorder()}}
	if err := r.begin(); err != nil {
		return nil, err
	}
	log, err := os.CreateTemp("", "trace-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.Remove(log.Name()) }() // a temporary file
	defer func() { _ = log.Close() }()
	args := []string{"-f", "-qq", "-xx", "-s", "67108864", "-e", "signal=none", "-e", "trace=" + traced, "-o", log.Name(), "--"}
	strace := exec.Command("strace", append(append(args, cmd.Path), cmd.Args[1:]...)...)
	strace.Env, strace.Dir = cmd.Env, cmd.Dir
	if out, err := strace.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", cmd, err, out)
	}
	if err := r.read(log); err != nil {
		return nil, err
	}
	return r.out, r.compare()
}

// replayer does in a Recorder what strace saw.
type replayer struct {
	root string
	out  *Traced
	fds  map[string]*openFile // by process-wide number; children are not traced apart
	now  map[string]backend.File
}

type openFile struct {
	f      backend.File // nil for the directory
	name   string
	pos    int64
	append bool
}

// begin takes over the files as they are.
func (r *replayer) begin() error {
	entries, err := os.ReadDir(r.root)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			return fmt.Errorf("%s is not a file", e.Name())
		}
		b, err := os.ReadFile(filepath.Join(r.root, e.Name()))
		if err != nil {
			return err
		}
		if r.now[e.Name()], err = r.out.Rec.Wrap(backend.NewMemBytes(e.Name(), b)); err != nil {
			return err
		}
		r.out.files++
	}
	r.out.Dir, err = r.out.Rec.Names(r.root, r.now)
	return err
}

var (
	lineRE   = regexp.MustCompile(`^(\d+) +(\w+)\((.*)\) += (-?\d+|0x[0-9a-f]+|\?)(.*)$`)
	resumeRE = regexp.MustCompile(`^(\d+) +<\.\.\. \w+ resumed>(.*)$`)
)

func (r *replayer) read(log *os.File) error {
	in := bufio.NewReader(log)
	pending := map[string]string{}
	for {
		line, err := in.ReadString('\n')
		if line == "" && err != nil {
			return nil
		}
		line = strings.TrimSuffix(line, "\n")
		if head, ok := strings.CutSuffix(line, "<unfinished ...>"); ok {
			pid, _, _ := strings.Cut(line, " ")
			pending[pid] = strings.TrimSuffix(head, " ")
			continue
		}
		if m := resumeRE.FindStringSubmatch(line); m != nil {
			line = pending[m[1]] + m[2]
		}
		m := lineRE.FindStringSubmatch(line)
		if m == nil {
			continue // an exit
		}
		result, err := strconv.ParseInt(m[4], 0, 64)
		if err != nil || result < 0 {
			continue // it failed: nothing was changed
		}
		if err := r.call(m[2], arguments(m[3]), result); err != nil {
			return fmt.Errorf("trace: %s: %w", line[:min(len(line), 300)], err)
		}
	}
}

// arguments splits at commas outside of strings and braces.
func arguments(s string) []string {
	var out []string
	depth, quoted, from := 0, false, 0
	for i, c := range []byte(s) {
		switch {
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			depth++
		case c == '}' || c == ']':
			depth--
		case c == ',' && depth == 0:
			out = append(out, strings.TrimSpace(s[from:i]))
			from = i + 1
		}
	}
	return append(out, strings.TrimSpace(s[from:]))
}

// text undoes -xx.
func text(arg string) (string, error) {
	if !strings.HasPrefix(arg, `"`) || !strings.HasSuffix(arg, `"`) {
		return "", fmt.Errorf("not a whole string: %.40q", arg)
	}
	var b strings.Builder
	for s := arg[1 : len(arg)-1]; s != ""; s = s[4:] {
		if len(s) < 4 || s[:2] != `\x` {
			return "", fmt.Errorf("not hexadecimal: %.40q", s)
		}
		c, err := strconv.ParseUint(s[2:4], 16, 8)
		if err != nil {
			return "", err
		}
		b.WriteByte(byte(c))
	}
	return b.String(), nil
}

// inRoot is the name of a path in the directory: "." is itself, "" is
// elsewhere.
func (r *replayer) inRoot(arg string) (string, error) {
	path, err := text(arg)
	if err != nil {
		return "", err
	}
	rel, err := filepath.Rel(r.root, path)
	if err != nil || !filepath.IsAbs(path) || strings.HasPrefix(rel, "..") {
		return "", nil
	}
	if strings.Contains(rel, "/") {
		return "", fmt.Errorf("a directory in the directory: %s", rel)
	}
	return rel, nil
}

func number(arg string) int64 {
	n, _ := strconv.ParseInt(arg, 0, 64) // strace prints numbers
	return n
}

// call does one successful call.
func (r *replayer) call(name string, a []string, result int64) error {
	switch name {
	case "openat", "openat2":
		return r.open(a[1], strings.Join(a[2:], ","), result)
	case "open":
		return r.open(a[0], a[1], result)
	case "creat":
		return r.open(a[0], "O_WRONLY|O_CREAT|O_TRUNC", result)
	case "close":
		delete(r.fds, a[0])
		return nil
	case "renameat", "renameat2":
		return r.rename(a[1], a[3])
	case "rename":
		return r.rename(a[0], a[1])
	case "unlinkat":
		return r.unlink(a[1])
	case "unlink":
		return r.unlink(a[0])
	case "mkdir", "mkdirat", "rmdir", "link", "symlink", "linkat", "symlinkat", "truncate":
		for _, arg := range a {
			if strings.HasPrefix(arg, `"`) {
				if in, err := r.inRoot(arg); in != "" || err != nil {
					return errors.Join(fmt.Errorf("not understood"), err)
				}
			}
		}
		return nil
	}
	f := r.fds[a[0]]
	if name == "copy_file_range" || name == "sendfile" || name == "splice" {
		for _, arg := range a {
			if r.fds[arg] != nil {
				return errors.New("not understood")
			}
		}
		return nil
	}
	if f == nil {
		return nil
	}
	if f.f == nil && name != "fsync" {
		return nil // of the directory
	}
	return r.change(f, name, a, result)
}

func (r *replayer) change(f *openFile, name string, a []string, result int64) error {
	switch name {
	case "write":
		if f.append {
			f.pos, _ = f.f.Size() // of memory
		}
		at := f.pos
		f.pos += result
		return r.write(f, a[1], result, at)
	case "pwrite64":
		return r.write(f, a[1], result, number(a[3]))
	case "writev", "pwritev", "pwritev2":
		at := f.pos
		if name == "writev" {
			f.pos += result
		} else {
			at = number(a[3])
		}
		for _, part := range regexp.MustCompile(`iov_base=("[^"]*")`).FindAllStringSubmatch(a[1], -1) {
			b, err := text(part[1])
			if err != nil {
				return err
			}
			if err := r.write(f, part[1], int64(len(b)), at); err != nil {
				return err
			}
			at += int64(len(b))
		}
		return nil
	case "lseek":
		f.pos = result
		return nil
	case "ftruncate":
		return f.f.Truncate(number(a[1]))
	case "fallocate":
		off, n := number(a[2]), number(a[3])
		switch {
		case strings.Contains(a[1], "PUNCH_HOLE"):
			return f.f.PunchHole(off, n)
		case strings.Contains(a[1], "ZERO_RANGE"):
			return f.f.ZeroRange(off, n)
		}
		return errors.New("not understood")
	case "fsync", "fdatasync":
		if f.f == nil {
			r.out.Syncs = append(r.out.Syncs, "fsync of the directory")
			return r.out.Dir.Sync()
		}
		r.out.Syncs = append(r.out.Syncs, name+" of "+plain(f.name))
		return f.f.Sync()
	case "fcntl":
		if strings.Contains(a[1], "DUP") {
			return errors.New("not understood")
		}
		return nil
	}
	return errors.New("not understood")
}

func (r *replayer) write(f *openFile, arg string, n, at int64) error {
	b, err := text(arg)
	if err != nil {
		return err
	}
	_, err = f.f.WriteAt([]byte(b)[:n], at)
	return err
}

func (r *replayer) open(path, flags string, fd int64) error {
	name, err := r.inRoot(path)
	if err != nil || name == "" {
		return err
	}
	key := strconv.FormatInt(fd, 10)
	if name == "." {
		if strings.Contains(flags, "O_TMPFILE") {
			return errors.New("not understood")
		}
		r.fds[key] = &openFile{name: name}
		return nil
	}
	f := r.now[name]
	if f == nil {
		if !strings.Contains(flags, "O_CREAT") {
			return errors.New("a file that came from elsewhere")
		}
		if f, err = r.out.Rec.Wrap(backend.NewMem(name)); err != nil {
			return err
		}
		r.out.files++
		r.now[name] = f
		if err := r.out.Dir.Link(name, f); err != nil {
			return err
		}
	} else if strings.Contains(flags, "O_TRUNC") {
		if err := f.Truncate(0); err != nil {
			return err
		}
	}
	r.fds[key] = &openFile{f: f, name: name, append: strings.Contains(flags, "O_APPEND")}
	return nil
}

func (r *replayer) rename(from, to string) error {
	old, err1 := r.inRoot(from)
	name, err2 := r.inRoot(to)
	if old == "" && name == "" || err1 != nil || err2 != nil {
		return errors.Join(err1, err2)
	}
	if old == "" || name == "" {
		return errors.New("into or out of the directory")
	}
	r.now[name] = r.now[old]
	delete(r.now, old)
	return r.out.Dir.Rename(old, name)
}

func (r *replayer) unlink(path string) error {
	name, err := r.inRoot(path)
	if err != nil || name == "" {
		return err
	}
	delete(r.now, name)
	return r.out.Dir.Remove(name)
}

// plain is a name without the number of a temporary file.
func plain(name string) string { return regexp.MustCompile(`\d{4,}`).ReplaceAllString(name, "N") }

// compare makes sure that the replay ended with what is really there.
func (r *replayer) compare() error {
	entries, err := os.ReadDir(r.root)
	if err != nil {
		return err
	}
	if len(entries) != len(r.now) {
		return fmt.Errorf("trace: %d files, and %d in the replay", len(entries), len(r.now))
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(r.root, e.Name()))
		if err != nil {
			return err
		}
		f := r.now[e.Name()]
		if f == nil {
			return fmt.Errorf("trace: %s was not seen", e.Name())
		}
		size, err := f.Size()
		if err != nil {
			return err
		}
		got := make([]byte, size)
		if n, err := f.ReadAt(got, 0); n < len(got) {
			return err
		}
		if string(got) != string(b) {
			return fmt.Errorf("trace: %s differs from its replay", e.Name())
		}
	}
	return nil
}

// Put writes a state into an empty directory.
func (t *Traced) Put(s *backend.State, dir string) error {
	for name, i := range s.Names[t.Dir.Index()] {
		if err := os.WriteFile(filepath.Join(dir, name), s.Files[i].Bytes(), 0o600); err != nil {
			return err
		}
	}
	return nil
}
