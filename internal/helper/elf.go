package helper

import (
	"bytes"
	"debug/elf"
	"errors"
	"io"
	"path/filepath"
)

// maxInterpreter bounds the name of a loader, in bytes (PATH_MAX).
const maxInterpreter = 4096

// interpreter is the loader that the kernel runs for a program, "" for one
// that needs none or is a script.
func interpreter(path string) (string, error) {
	f, err := elf.Open(path)
	var notELF *elf.FormatError
	if errors.As(err, &notELF) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP || p.Filesz > maxInterpreter {
			continue
		}
		b := make([]byte, p.Filesz)
		if _, err := p.ReadAt(b, 0); err != nil {
			return "", err
		}
		return filepath.EvalSymlinks(string(bytes.TrimRight(b, "\x00")))
	}
	return "", nil
}
