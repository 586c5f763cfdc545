// Queries the gateway: go run infer.go http://HOST:PORT [MODEL]. Needs nothing beyond Go's own packages.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
)

type tensor struct {
	Name     string    `json:"name"`
	Datatype string    `json:"datatype"`
	Shape    []int     `json:"shape"`
	Data     []float32 `json:"data"`
}

type query struct {
	Inputs     []tensor       `json:"inputs"`
	Parameters map[string]any `json:"parameters"`
}

func run(url, model string) error {
	input := tensor{Name: "input", Datatype: "FP32", Shape: []int{1, 1, 20, 20}, Data: make([]float32, 400)}
	body, err := json.Marshal(query{
		Inputs:     []tensor{input},
		Parameters: map[string]any{"timeout": 500000}, // microseconds
	})
	if err != nil {
		return err
	}
	answer, err := http.Post(url+"/v2/models/"+model+"/infer", "application/json", bytes.NewReader(body))
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		return err
	}
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", answer.Status, text)
	}
	fmt.Println(string(text))
	return nil
}

func main() {
	model := "digits"
	if len(os.Args) > 2 {
		model = os.Args[2]
	}
	if err := run(os.Args[1], model); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
